"""Settings that every test shares: no network, no telemetry, one thread, fixed seeds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    TRL_EXPERIMENTAL_SILENCE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny policy, an adapter and ten pairs, by path; nothing is written there."""
    from tests.probing import write_rows
    from tests.tiny import gpt2_tokenizer, save_adapter, save_policy

    folder = tmp_path_factory.mktemp("inputs")
    base = save_policy(folder / "base", gpt2_tokenizer())
    return {
        "base": base,
        "adapter": save_adapter(folder / "adapter", base),
        "data": write_rows(folder / "rows.jsonl"),
    }


@pytest.fixture
def keeping_float64() -> Iterator[None]:
    """Oracles by hand in float64 all the way: transformers' own norms and rotary factors would go through float32."""
    from entangle.scores.float64 import KeepFloat64

    with KeepFloat64():
        yield


@pytest.fixture
def tldr() -> Path:
    """The folder of real TL;DR data beside the project."""
    folder = SHARED / "data" / "tldr"
    if not folder.is_dir():
        pytest.skip("the real TL;DR data (../shared/data/tldr) isn't beside the project")
    return folder


@pytest.fixture
def small_llama() -> Path:
    """The folder of a small real Llama beside the project."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the small real Llama (../shared/models/stories260k) isn't beside the project")
    return folder
