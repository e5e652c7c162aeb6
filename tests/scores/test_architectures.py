"""The factored engine equals the oracle on every architecture, in all parameters and in LoRA's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.scores import AutogradEngine, FactoredEngine, PairScores
from entangle.scores.logps import Rows
from entangle.scores.prefix import split_for
from entangle.scores.rows import RowBatch
from tests.architectures import ARCHITECTURES, random_batch, tiny_model, trainable, with_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*_pattern keys.*:RuntimeWarning")  # PEFT, expert banks

FLOAT32_INSIDE = {"gemma", "gemma2", "gemma3", "gptj", "gpt_neo", "cohere"}
"""Their attention or norm drops to float32 even in a float64 model, so rows agree to float32 only."""

NO_RULE = {"mixtral": {"lora"}, "qwen3_moe": {"lora"}}
"""LoRA on expert banks is a parametrisation of weights, not a layer: it goes by the fallback."""

CASES = [(name, kind) for name in ARCHITECTURES for kind in ("all", "lora")]


def probed_model(name: str, kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny model whose trainable parameters are all of its own, or a LoRA adapter's."""
    model = tiny_model(name, dtype)
    if kind == "all":
        return model.requires_grad_(True)
    return with_lora(model, lora_dropout=0.0 if name in NO_RULE else 0.1)


def relative_error(fast: Tensor, oracle: Tensor) -> float:
    """Worst |K - K'| / (|S_a| |S_b|): an inner product near zero has no relative error of its own."""
    norms = oracle.diagonal().sqrt()
    return float(((fast - oracle).abs() / (norms[:, None] * norms)).max())


def pair_error(fast: PairScores, oracle: PairScores) -> float:
    """Worst error of a pair's block, in units of its larger squared norm."""
    scale = torch.maximum(oracle.geometry.sq_chosen, oracle.geometry.sq_rejected)
    blocks = [(fast.geometry, oracle.geometry)]
    if oracle.modules is not None and fast.modules is not None:
        assert fast.modules.keys() == oracle.modules.keys()
        blocks += [(fast.modules[name], oracle.modules[name]) for name in oracle.modules]
    return max(
        float(((getattr(a, column) - getattr(b, column)).abs() / scale).max())
        for a, b in blocks
        for column in GEOMETRY_COLUMNS
    )


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_equals_the_oracle(name: str, kind: str, share_prompts: bool) -> None:
    """Float64. Gram, pair blocks per module, and log-probs."""
    model = probed_model(name, kind)
    engine = FactoredEngine(model, trainable(model), fallback=True, share_prompts=share_prompts)
    oracle = AutogradEngine(model, trainable(model))
    batch = random_batch()
    tolerance = 1e-6 if name in FLOAT32_INSIDE else 1e-12
    fast, slow = engine.pairs(batch, modules=True), oracle.pairs(batch, modules=True)
    assert pair_error(fast, slow) < tolerance
    assert relative_error(engine.gram(batch), oracle.gram(batch)) < tolerance
    torch.testing.assert_close(fast.logps, slow.logps, rtol=0, atol=1e-6 if tolerance == 1e-6 else 1e-12)
    assert bool(engine.notes) == (kind in NO_RULE.get(name, ()))  # nothing was given up unawares


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_parameter_is_covered_or_named(name: str, kind: str) -> None:
    """Covered and fallback make up all trainable names; the fallback is what the table says."""
    model = probed_model(name, kind)
    engine = FactoredEngine(model, trainable(model), fallback=True)
    left = set(trainable(model)) - engine.covered
    assert left == {
        n for n in trainable(model) if kind in NO_RULE.get(name, ()) and ".mlp." in n and "lora_" in n
    }


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "lora"), ("llama", "all"), ("gpt2", "all"), ("qwen2", "lora")]
)
def test_float32(name: str, kind: str) -> None:
    """1e-6 against the oracle in float64 on the same weights."""
    model, exact = probed_model(name, kind, torch.float32), probed_model(name, kind, torch.float32).double()
    batch = random_batch()
    fast = FactoredEngine(model, trainable(model)).gram(batch)
    assert relative_error(fast, AutogradEngine(exact, trainable(exact)).gram(batch)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_groups_of_any_size(name: str) -> None:
    """Four responses to a prompt, and one."""
    model = probed_model(name, "lora")
    for group_size in (1, 4):
        batch = random_batch(prompts=2, group_size=group_size)
        fast = FactoredEngine(model, trainable(model)).gram(batch)
        assert relative_error(fast, AutogradEngine(model, trainable(model)).gram(batch)) < 1e-12


def some_prompt_is_shared(model: nn.Module, batch: RowBatch) -> bool:
    """Whether the engine would split this batch."""
    return split_for(model, Rows.from_batch(batch), batch.group_size) is not None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_batch_above_is_split(name: str) -> None:
    """Guards the tests above: their batches do exercise the shared prompt."""
    assert some_prompt_is_shared(tiny_model(name), random_batch())
