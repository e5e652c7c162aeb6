"""4- and 8-bit bases under LoRA, by bitsandbytes on the CPU, against plain autograd over the same model."""

from __future__ import annotations

import logging

import pytest
import torch
from peft.utils import get_peft_model_state_dict

from entangle import embedded
from entangle.config import ModelOptions
from entangle.data import load_pairs, tokenize_pair
from entangle.models import Policy, check_reference, load_policy
from entangle.scores import AutogradEngine, FactoredEngine, PairScores, make_engine

pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:MatMul8bitLt", "ignore::FutureWarning"
)


def policy_of(**options) -> Policy:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return load_policy(ModelOptions(embedded.POLICY, adapter_name_or_path=embedded.ADAPTER, **options))


def batch_of(policy: Policy):
    pairs = load_pairs(embedded.PAIRS, limit=4)[1:]  # the first one is nearly parallel
    return policy.collate([tokenize_pair(policy.tokenizer, pair, 256) for pair in pairs])


def error(found: PairScores, expected: PairScores) -> float:
    scale = (expected.geometry.sq_chosen * expected.geometry.sq_rejected).sqrt()
    return float(((found.geometry.inner - expected.geometry.inner).abs() / scale).max())


@pytest.mark.parametrize("share_prompts", [True, False])
def test_four_bits_equal_the_oracle(share_prompts):
    """The rounded weights are one fixed function, computed in float32: as exact as any other."""
    policy = policy_of(load_in_4bit=True)
    batch = batch_of(policy)
    engine = FactoredEngine(policy.model, policy.parameters, share_prompts=share_prompts)
    assert error(engine.pairs(batch), AutogradEngine(policy.model, policy.parameters).pairs(batch)) < 2e-6
    assert engine.resolution == 1e-6 and not engine.notes and policy.description["bits"] == 4
    check_reference(policy, batch)


def test_eight_bits_are_approximate_and_say_so():
    """Activations are rounded to 8 bits inside, so two exact computations differ by about a hundredth."""
    policy = policy_of(load_in_8bit=True)
    batch = batch_of(policy)
    engine = FactoredEngine(policy.model, policy.parameters)
    oracle = AutogradEngine(policy.model, policy.parameters)
    assert error(engine.pairs(batch), oracle.pairs(batch)) < engine.resolution == 2e-2
    assert "approximate" in " ".join(policy.notes)


def test_four_bits_measure_another_model():
    """Not the float32 one: its own scores, at a distance that rounding to 4 bits explains."""
    rounded, plain = policy_of(load_in_4bit=True), policy_of()
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(get_peft_model_state_dict(p.model).values() for p in (rounded, plain)), strict=True)
    )
    batch = batch_of(plain)
    scores = [make_engine(p.model, p.parameters).pairs(batch) for p in (rounded, plain)]
    assert 1e-4 < error(*scores) < 0.5
