"""The walk over architectures: the page in the documentation holds, and nothing on it is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from experiments.architectures.shapes import ARCHITECTURES
from experiments.architectures.walk import TOLERANCE, walk

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_pattern keys.*:RuntimeWarning"),  # PEFT, expert banks
    pytest.mark.usefixtures("keeping_float64"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

WALKED = (
    "apertus",
    "bert",
    "bloom",
    "doge",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "jetmoe",
    "lfm2_moe",
    "llama",
    "llama4_text",
    "longcat_flash",
    "mamba2",
    "minimax_m2",
    "mixtral",
    "phimoe",
    "qwen3_next",
    "roberta",
    "rwkv",
    "xlnet",
)
"""One for every way of being exact, going by autograd or being refused; the script walks all."""


def page_rows() -> dict[str, tuple[str, str]]:
    """Verdicts of full and LoRA by model type."""
    rows = re.findall(r"^\| `([^`]+)` \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    return {kind: (full.split(":")[0], lora.split(":")[0]) for kind, full, lora in rows}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WALKED)
def test_the_page_holds(kind: str) -> None:
    """Gradients taken by hand agree, and each type goes the way that the page says."""
    outcomes = walk(kind)
    assert all(outcome.verdict != "wrong" for outcome in outcomes.values()), outcomes
    assert all(outcome.error is None or outcome.error < TOLERANCE for outcome in outcomes.values())
    if transformers.__version__ in PAGE.read_text():
        assert tuple(outcome.verdict for outcome in outcomes.values()) == page_rows()[kind]


def test_nothing_on_the_page_is_wrong() -> None:
    """Every verdict is one of those that the page explains, and every type stands on it."""
    rows = page_rows()
    assert {verdict for row in rows.values() for verdict in row} == {
        "exact",
        "fallback",
        "refused",
        "not built",
    }
    listed = set(rows) | set(re.findall(r"^- `([^`]+)`:", PAGE.read_text(), re.MULTILINE))
    if transformers.__version__ in PAGE.read_text():
        assert listed == set(ARCHITECTURES)
    assert all(verdict == "exact" for kind in ("llama", "qwen3", "gemma3_text") for verdict in rows[kind])
