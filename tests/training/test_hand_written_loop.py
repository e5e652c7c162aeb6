"""The README's training loop by hand, run as it stands there."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from peft import get_peft_model

import entangle.embedded
from tests.training import runs

SNIPPET = """
import json
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from entangle.embedded import ADAPTER, PAIRS, POLICY
from losses import DPO, as_function

tokenizer = AutoTokenizer.from_pretrained(POLICY)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(POLICY), ADAPTER, is_trainable=True)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
dpo_loss = as_function(DPO(beta=0.1))  # or any other of `entangle losses`


def logp(prompt, response):  # log pi(response | prompt), summed over its tokens, (1,)
    ids = tokenizer(prompt + response + tokenizer.eos_token, return_tensors="pt").input_ids
    tokens = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return tokens[:, len(tokenizer(prompt).input_ids) - 1 :].sum(1)


for pair in map(json.loads, PAIRS.read_text(encoding="utf-8").splitlines()[::8]):
    sides = [(pair["prompt"], pair["chosen"]), (pair["prompt"], pair["rejected"])]
    before = [logp(*side) for side in sides]
    with torch.no_grad(), model.disable_adapter():
        reference = [logp(*side) for side in sides]
    dpo_loss(*before, *reference)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        change = [float(logp(*side) - old) for side, old in zip(sides, before)]
    print(f"{pair['kind']}: chosen {change[0]:+.3f}, rejected {change[1]:+.3f} nats")
"""


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
