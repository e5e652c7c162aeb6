"""What engines take for granted of a model is checked on it, and what doesn't hold is refused or goes another way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entangle.errors import UserError
from entangle.scores import AutogradEngine, FactoredEngine, UncoveredParameter, make_engine, row_logps
from entangle.scores.rules import RULES, Call, RuleEntry, linear
from entangle.scores.terms import Term
from experiments.architectures.shapes import tiny_model as smallest
from tests.architectures import random_batch, select, tiny_model, trainable, with_lora
from tests.scores.test_architectures import relative_error


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "xlnet"])
def test_encoders_are_refused(kind: str, engine: str) -> None:
    """By name, whichever engine and whichever result is asked for."""
    model = smallest(kind)
    with pytest.raises(UserError, match=r"^[A-Za-z]+(LM|Model).* isn't causal: a later token changes"):
        make_engine(model, trainable(model), engine).gram(random_batch())  # pyright: ignore
    with pytest.raises(UserError, match="isn't causal"):
        make_engine(model, trainable(model), engine).check(random_batch())  # pyright: ignore


def test_a_decoder_of_an_encoders_class_is_not() -> None:
    """BERT with is_decoder is a causal model."""
    model = smallest("bert", is_decoder=True)
    batch = random_batch()
    parameters = {name: p for name, p in trainable(model).items() if name.startswith("bert.")}
    fast, slow = (engine(model, parameters).gram(batch) for engine in (FactoredEngine, AutogradEngine))
    assert relative_error(fast, slow) < 1e-12


def test_what_shows_on_long_rows_only() -> None:
    """Doge picks the best keys of all that stand in a row as soon as there are more than it keeps, later ones too."""
    model = smallest("doge")
    lengths = random_batch(prompts=6).attention_mask.sum(1)
    short = select(random_batch(prompts=6), [k for k in range(12) if lengths[k] <= 5], 1)
    long = select(random_batch(prompts=6), [k for k in range(12) if lengths[k] > 10], 1)
    FactoredEngine(model, trainable(model), fallback=True).check(short)
    with pytest.raises(UserError, match="DogeForCausalLM isn't causal"):
        FactoredEngine(model, trainable(model), fallback=True).check(long)


@pytest.mark.parametrize("engine", [FactoredEngine, AutogradEngine])
def test_rows_that_mix_are_refused(engine: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that looks at the whole batch."""
    model = tiny_model("llama")
    mlp = type(model.get_submodule("model.layers.0.mlp"))
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, x - x.mean(0, keepdim=True)))
    with pytest.raises(UserError, match="LlamaForCausalLM mixes the rows of a batch"):
        engine(model, trainable(model)).gram(random_batch())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_float64(name: str) -> None:
    """Grouped products exist up to float32; experts are evaluated one by one, and the model's own way comes back."""
    model, plain = tiny_model(name, experts_implementation="grouped_mm"), tiny_model(name)
    batch = random_batch()
    with pytest.raises(RuntimeError, match="Double"):
        model(input_ids=batch.input_ids[:1])
    expected = AutogradEngine(plain, trainable(plain)).gram(batch)
    for engine in (FactoredEngine, AutogradEngine):
        assert relative_error(engine(model, trainable(model)).gram(batch), expected) < 1e-12
    torch.testing.assert_close(row_logps(model, batch), row_logps(plain, batch))
    assert getattr(model.config, "_experts_implementation") == "grouped_mm"  # noqa: B009


def test_a_rule_that_cannot_be_applied_is_given_up() -> None:
    """JetMoe's experts take token counts per expert, in which rows can't be told apart."""
    model, batch = smallest("jetmoe"), random_batch()
    engine = FactoredEngine(model, trainable(model), fallback=True)
    assert relative_error(engine.gram(batch), AutogradEngine(model, trainable(model)).gram(batch)) < 1e-12
    assert any("of JetMoeParallelExperts can't go by their rule" in note for note in engine.notes)
    assert "lm_head.weight" in engine.covered or "model.embed_tokens.weight" in engine.covered
    with pytest.raises(UncoveredParameter, match="JetMoeParallelExperts"):
        weights = {n: p for n, p in trainable(model).items() if n.endswith("weight")}
        FactoredEngine(model, weights).gram(batch)


def test_a_rule_that_fails_later_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch passed; what fails on a later one is said with what to do, without a traceback."""
    model, failing = tiny_model("llama"), []

    def fragile(module: nn.Linear, call: Call) -> dict[str, Term]:
        if failing:
            raise RuntimeError("no token came here")
        return linear(module, call)

    monkeypatch.setitem(RULES, nn.Linear, RuleEntry(fragile, frozenset({"weight", "bias"})))
    engine = FactoredEngine(model, trainable(model))
    engine.gram(random_batch())
    failing.append(True)
    with pytest.raises(UserError, match="Linear .*no token came here.*--engine autograd"):
        engine.gram(random_batch())


def test_an_adapter_that_cannot_run_is_refused() -> None:
    """PEFT wraps a router that returns several values; no forward pass works then."""
    model = with_lora(smallest("phimoe"), lora_dropout=0.0)
    with pytest.raises(UserError, match=r"PhimoeForCausalLM can't be evaluated .*AttributeError"):
        make_engine(model, trainable(model)).gram(random_batch())


@pytest.mark.parametrize(
    ("kind", "layer", "tolerance"), [("jamba", "dt_proj", 1e-6), ("longcat_flash", "classifier", 1e-12)]
)
def test_weights_that_are_read_past_their_layer_are_not_folded(
    kind: str, layer: str, tolerance: float
) -> None:
    """The adapter has no say there; folded into the weight it would have one."""
    model = with_lora(smallest(kind), target_modules=[layer, "q_proj", "o_proj"], lora_dropout=0.0)
    batch = random_batch()
    engine, oracle = make_engine(model, trainable(model)), AutogradEngine(model, trainable(model))
    fast, slow = engine.pairs(batch), oracle.pairs(batch)
    torch.testing.assert_close(fast.logps, slow.logps, rtol=0, atol=max(tolerance, 1e-9))
    assert relative_error(engine.gram(batch), oracle.gram(batch)) < tolerance
    assert any(f"LoRA isn't folded into {layer}:" in note for note in engine.notes)
    assert any("o_proj" in name for name in engine.covered)  # pyright: ignore


def test_a_check_asked_for_costs_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for with the longest rows, it isn't made again with the first batch."""
    calls = []
    monkeypatch.setattr("entangle.scores.base.check_causal", lambda *_: calls.append(1))
    model = tiny_model("llama")
    for engine in (FactoredEngine(model, trainable(model)), AutogradEngine(model, trainable(model))):
        calls.clear()
        engine.check(random_batch())
        engine.gram(random_batch())
        engine.pairs(random_batch())
        assert calls == [1]
