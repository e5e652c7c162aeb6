"""The training script of the embedded policy, end to end on a handful of rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "experiments" / "embedded" / "train.py"
DATA = REPOSITORY.parent / "shared" / "data" / "tldr"


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the training script in a process of its own."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_absent_data_ends_with_a_message(tmp_path: Path) -> None:
    """Without the data the script says so, with status 2, and writes nothing."""
    finished = run_script("--data", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out"))
    assert finished.returncode == 2
    assert "no TL;DR data at" in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the TL;DR data beside the repository is absent")
def test_quick_run_writes_policy_and_adapter(tmp_path: Path) -> None:
    """A quick run leaves a loadable policy, an adapter with two non-zero factors, and the card."""
    finished = run_script("--quick", "--output_dir", str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    policy, adapter = tmp_path / "policy", tmp_path / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    text = " tidy \u00bd\u200b 👩‍👧 \x00\r\n\U0010ffff e\u0301"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert model.config.vocab_size == len(tokenizer)
    factors = load_file(adapter / "adapter_model.safetensors")
    assert all(factor.abs().sum() > 0 for factor in factors.values())
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "entangle/embedded/policy"
    record = json.loads((policy / "training.json").read_text(encoding="utf-8"))
    assert record["parameters"] == model.num_parameters()
    assert {path.name for path in policy.iterdir()} >= {"README.md", "loss.svg"}
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
