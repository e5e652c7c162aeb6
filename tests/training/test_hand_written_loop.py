"""The README's training loop by hand, run as it stands there."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from peft import get_peft_model

import entangle.embedded
from tests.test_readme import blocks
from tests.training import runs

SNIPPET = next(block for block in blocks("python") if "as_function" in block)


def run_snippet() -> list[str]:
    """What the snippet prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(SNIPPET, "README", "exec"), {})
    return printed.getvalue().splitlines()


def changes(line: str) -> tuple[float, float]:
    """The two numbers of a printed line."""
    words = line.replace(",", "").split()
    return float(words[words.index("chosen") + 1]), float(words[words.index("rejected") + 1])


def check(lines: list[str], count: int) -> None:
    """One line per pair, and every step raised the margin of its own pair, as a gradient step on it must."""
    assert len(lines) == count
    for line in lines:
        chosen, rejected = changes(line)
        assert chosen > rejected


def test_on_a_random_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop runs on any policy and adapter: here a random model whose adapter is untrained."""
    tokenizer = runs.tokenizer()
    tokenizer.save_pretrained(tmp_path / "policy")
    base = runs.policy()
    base.save_pretrained(tmp_path / "policy")
    get_peft_model(base, runs.LORA).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(entangle.embedded, "POLICY", tmp_path / "policy")
    monkeypatch.setattr(entangle.embedded, "ADAPTER", tmp_path / "adapter")
    texts = [{"kind": "synthetic"} | row for row in runs.pairs(32)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    monkeypatch.setattr(entangle.embedded, "PAIRS", pairs)
    check(run_snippet(), count=4)


@pytest.mark.skipif(not entangle.embedded.POLICY.is_dir(), reason="the embedded policy isn't there yet")
def test_on_the_embedded_policy() -> None:
    """As a reader runs it."""
    check(run_snippet(), count=9)
