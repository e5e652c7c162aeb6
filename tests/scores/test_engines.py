"""What every engine promises: the oracle is right, and a row's numbers are its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.scores import (
    RULES,
    AutogradEngine,
    Call,
    Engine,
    FactoredEngine,
    UncoveredParameter,
    make_engine,
    register_rule,
    row_logps,
)
from entangle.scores.rows import RowBatch
from entangle.scores.rules import vector
from entangle.scores.terms import Term
from tests.architectures import random_batch, select, tiny_model, trainable, with_lora
from tests.scores.test_architectures import pair_error, probed_model, relative_error

ENGINES = {
    "autograd": AutogradEngine,
    "factored": FactoredEngine,
    "unshared": lambda model, parameters: FactoredEngine(model, parameters, share_prompts=False),
}


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine on a GPT-2 with tied weights, all parameters."""
    model = tiny_model("gpt2").requires_grad_(True)
    return ENGINES[request.param](model, trainable(model))


def test_oracle_equals_finite_differences() -> None:
    """<S_a, v> = d/dh log pi_a(theta + h v), central differences in float64: error O(h^2) + O(1e-16 / h)."""
    model = tiny_model("gpt2").requires_grad_(True)
    batch, parameters = random_batch(), trainable(model)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    products = AutogradEngine(model, parameters).products(batch, direction)
    sides = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for name, p in parameters.items():
                p += step * direction[name]
        sides.append(row_logps(model, batch))
    torch.testing.assert_close(products, (sides[0] - sides[1]) / 2e-5, rtol=1e-6, atol=1e-5)


def test_oracle_gram_is_that_of_stacked_gradients() -> None:
    """The oracle against a second, plainer spelling: .backward() on full logits, one row at a time."""
    model = tiny_model("gpt2").requires_grad_(True)
    batch = random_batch()
    rows = []
    for ids, mask, completion in zip(
        batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True
    ):
        model.zero_grad()
        row, scored = ids[mask.bool()], completion[mask.bool()].bool()
        logps = model(input_ids=row[None]).logits[0].log_softmax(-1)
        logps[:-1][scored[1:], row[1:][scored[1:]]].sum().backward()
        rows.append(torch.cat([p.grad.ravel() for p in model.parameters()]))
    scores = torch.stack(rows)
    gram = AutogradEngine(model, trainable(model)).gram(batch)
    torch.testing.assert_close(gram, scores @ scores.T, rtol=1e-12, atol=1e-12)


def test_pair_block_is_the_gram(engine: Engine) -> None:
    """A, B, c and the gaps are entries and differences of the Gram matrix; it is symmetric and PSD."""
    batch = random_batch()
    gram, geometry = engine.gram(batch), engine.pairs(batch).geometry
    w, l = torch.arange(3), torch.arange(3, 6)  # noqa: E741
    expected = (gram[w, w], gram[l, l], gram[w, l], gram[w, w] - gram[w, l], gram[l, l] - gram[w, l])
    for column, value in zip(GEOMETRY_COLUMNS, expected, strict=True):
        torch.testing.assert_close(getattr(geometry, column), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-10)
    assert torch.linalg.eigvalsh(gram).min() > -1e-10 * gram.diagonal().max()


def test_modules_sum_to_the_whole(engine: Engine) -> None:
    """Per-module blocks are named by their module and add up."""
    scores = engine.pairs(random_batch(), modules=True)
    assert scores.modules is not None and "transformer.wte" in scores.modules
    for column in GEOMETRY_COLUMNS:
        total = torch.stack([getattr(block, column) for block in scores.modules.values()]).sum(0)
        torch.testing.assert_close(total, getattr(scores.geometry, column), rtol=1e-12, atol=1e-12)


def test_products_with_a_score_are_the_gram(engine: Engine) -> None:
    """<S_a, S_b> by `products` along S_b = by `gram`."""
    batch = random_batch()
    oracle = AutogradEngine(engine.model, engine.parameters)
    _, score = next(iter(oracle._scores(batch)))
    torch.testing.assert_close(engine.products(batch, score), engine.gram(batch)[:, 0], rtol=1e-9, atol=1e-9)


def test_direction_may_name_some_parameters(engine: Engine) -> None:
    """Names that are absent don't move."""
    batch = random_batch()
    name = "transformer.h.0.attn.c_attn.weight"
    step = torch.randn_like(engine.parameters[name])
    alone = engine.products(batch, {name: step})
    zeros = {n: torch.zeros_like(p) for n, p in engine.parameters.items()}
    torch.testing.assert_close(alone, engine.products(batch, zeros | {name: step}), rtol=1e-12, atol=1e-12)
    assert alone.abs().min() > 0


def test_metric(engine: Engine) -> None:
    """<g, P g'> with P = 4 is four times <g, g'>; with random P it is the Gram of sqrt(P) g."""
    batch = random_batch()
    four = {name: torch.full_like(p, 4.0) for name, p in engine.parameters.items()}
    plain = engine.pairs(batch).geometry
    scaled = engine.pairs(batch, metric=four).geometry
    torch.testing.assert_close(scaled.gap_chosen, 4 * plain.gap_chosen, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(engine.gram(batch, metric=four), 4 * engine.gram(batch), rtol=1e-9, atol=1e-9)
    metric = {name: torch.rand_like(p) + 0.1 for name, p in engine.parameters.items()}
    oracle = AutogradEngine(engine.model, engine.parameters)
    scores = [score for _, score in oracle._scores(batch)]
    flat = torch.stack([torch.cat([(s[n] * metric[n].sqrt()).ravel() for n in s]) for s in scores])
    torch.testing.assert_close(engine.gram(batch, metric=metric), flat @ flat.T, rtol=1e-9, atol=1e-9)
    weighted = engine.pairs(batch, metric=metric).geometry
    torch.testing.assert_close(weighted.inner, (flat[:3] * flat[3:]).sum(1), rtol=1e-9, atol=1e-9)


def test_neighbours_padding_and_order_change_nothing(engine: Engine) -> None:
    """Float64, 1e-12: batch of one = batch of many = permuted batch = padded on the left."""
    batch = random_batch(prompts=4)
    whole = engine.pairs(batch).geometry
    order = [2, 0, 3, 1]
    variants = {
        "permuted": (select(batch, [*order, *(4 + i for i in order)], 2), order),
        "single": (select(batch, [1, 5], 2), [1]),
        "left": (random_batch(prompts=4, side="left", padding=7), [0, 1, 2, 3]),
    }
    for name, (other, rows) in variants.items():
        geometry = engine.pairs(other).geometry
        for column in GEOMETRY_COLUMNS:
            expected = getattr(whole, column)[rows]
            error = (getattr(geometry, column) - expected).abs() / whole.sq_chosen[rows]
            assert error.max() < 1e-12, (name, column)


def test_model_is_left_as_it_was(engine: Engine) -> None:
    """Mode, requires_grad, .grad (the very tensor) and weights (the very storage), also when a pass fails."""
    model, batch = engine.model, random_batch()
    parameters = dict(model.named_parameters())
    kept = parameters["transformer.wpe.weight"]
    kept.grad = torch.ones_like(kept)
    parameters[
        "lm_head.weight" if "lm_head.weight" in parameters else "transformer.ln_f.bias"
    ].requires_grad_(False)
    model.train()
    state = [(p.requires_grad, p.grad, p.data_ptr(), p.detach().clone()) for p in parameters.values()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    engine.gram(batch)
    engine.pairs(batch)
    bad = RowBatch(batch.input_ids + 1000, batch.attention_mask, batch.completion_mask, batch.prompt_length)
    with pytest.raises(IndexError):
        engine.gram(bad)
    assert model.training
    for (needed, grad, pointer, value), p in zip(state, parameters.values(), strict=True):
        assert (p.requires_grad, p.data_ptr()) == (needed, pointer)
        assert p.grad is grad
        assert torch.equal(p, value)
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_works_under_no_grad(engine: Engine) -> None:
    """A caller's no_grad doesn't reach the engine."""
    batch = random_batch()
    with torch.no_grad():
        inside = engine.gram(batch)
    torch.testing.assert_close(inside, engine.gram(batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["all", "lora"])
@pytest.mark.parametrize("name", ["autograd", "factored", "unshared"])
def test_a_broken_row_spoils_nobody_else(name: str, kind: str) -> None:
    """A token whose embedding is NaN: its row has no numbers, every other row keeps its own."""
    model = probed_model("llama_biased", kind)
    batch = random_batch()
    expected = ENGINES[name](model, trainable(model)).gram(batch)
    row = int(batch.lengths.argmax())
    assert batch.lengths[row] > 1  # or the token would only be predicted, never read
    broken = batch.input_ids.clone()
    broken[row, batch.prompt_length[row % 3]] = 2  # its first response token; nobody else has token 2
    with torch.no_grad():
        dict(model.named_parameters())[
            "model.embed_tokens.weight" if kind == "all" else "base_model.model.model.embed_tokens.weight"
        ][2] = torch.nan
    bad = RowBatch(broken, batch.attention_mask, batch.completion_mask, batch.prompt_length)
    gram = ENGINES[name](model, trainable(model)).gram(bad)
    others = [i for i in range(6) if i != row]
    assert gram[row].isnan().all()
    torch.testing.assert_close(gram[others][:, others], expected[others][:, others], rtol=0, atol=1e-9)
    geometry = ENGINES[name](model, trainable(model)).pairs(bad).geometry
    assert geometry.is_finite.tolist() == [i != row % 3 for i in range(3)]


@pytest.mark.parametrize("name", list(ENGINES))
def test_a_token_that_is_only_predicted_is_never_read(name: str) -> None:
    """The last token is never an input, so its embedding may even be NaN."""
    model, batch = probed_model("llama", "lora"), random_batch()
    row = int(batch.attention_mask.sum(1).argmin())
    ids = batch.input_ids.clone()
    ids[row, int(batch.attention_mask[row].sum()) - 1] = 2
    batch = RowBatch(ids, batch.attention_mask, batch.completion_mask, batch.prompt_length)
    expected = ENGINES[name](model, trainable(model)).gram(batch)
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight[2] = torch.nan
    gram = ENGINES[name](model, trainable(model)).gram(batch)
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-12)


def test_identical_responses_have_no_gap(engine: Engine) -> None:
    """Chosen = rejected: A = B = c, and both gaps are zero to round-off."""
    batch = random_batch()
    twice = select(batch, [0, 1, 0, 1], 2)
    geometry = engine.pairs(twice).geometry
    assert (geometry.gap_chosen.abs() / geometry.sq_chosen).max() < 1e-14
    assert (geometry.gap_rejected.abs() / geometry.sq_chosen).max() < 1e-14


def test_gap_keeps_its_digits() -> None:
    """Responses that differ in their last token, float32: the gap's error is round-off of A, and no more."""
    model, exact = (probed_model("llama", "lora", torch.float32) for _ in range(2))
    batch = random_batch(prompts=1)
    ids = batch.input_ids[[0, 0]].clone()
    ids[1, int(batch.attention_mask[0].sum()) - 1] += 1
    near = RowBatch(ids, batch.attention_mask[[0, 0]], batch.completion_mask[[0, 0]], batch.prompt_length)
    fast = FactoredEngine(model, trainable(model)).pairs(near).geometry
    exact = exact.double()
    slow = AutogradEngine(exact, trainable(exact)).pairs(near).geometry
    assert ((fast.gap_chosen - slow.gap_chosen).abs() / slow.sq_chosen).max() < 1e-7


def test_refusals() -> None:
    """No parameters, foreign parameters, one under two names, groups that aren't pairs, unknown engines."""
    model = tiny_model("gpt2")
    weight = model.transformer.wpe.weight
    with pytest.raises(ValueError, match="needs parameters"):
        make_engine(model, {})
    with pytest.raises(ValueError, match="each under one name"):
        make_engine(model, {"a": weight, "b": weight})
    with pytest.raises(ValueError, match="these aren't: \\['a'\\]"):
        make_engine(model, {"a": nn.Parameter(torch.zeros(2))})
    with pytest.raises(ValueError, match="2 responses per prompt; got group_size 3"):
        make_engine(model, {"a": weight}).pairs(random_batch(group_size=3))
    with pytest.raises(ValueError, match="Known engines"):
        make_engine(model, {"a": weight}, engine="fast")  # pyright: ignore[reportArgumentType]


class Scale(nn.Module):
    """A layer kind that no rule knows."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.full((width,), 1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled output."""
        return self.inner(x) * self.scale.tanh()


def test_unknown_layer_is_refused_or_left_to_the_oracle() -> None:
    """Never skipped: refused by name, or computed by autograd with a note."""
    model = tiny_model("llama")
    model.model.layers[0].mlp = Scale(model.model.layers[0].mlp, 16)
    parameters = trainable(model)
    with pytest.raises(UncoveredParameter, match="model.layers.0.mlp.scale"):
        make_engine(model, parameters, engine="factored")
    engine = make_engine(model, parameters)
    assert isinstance(engine, FactoredEngine)
    assert set(parameters) - engine.covered == {"model.layers.0.mlp.scale"}
    assert len(engine.notes) == 1 and "model.layers.0.mlp.scale" in engine.notes[0]
    batch, oracle = random_batch(), AutogradEngine(model, parameters)
    assert pair_error(engine.pairs(batch, modules=True), oracle.pairs(batch, modules=True)) < 1e-12
    assert relative_error(engine.gram(batch), oracle.gram(batch)) < 1e-12
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    torch.testing.assert_close(
        engine.products(batch, direction), oracle.products(batch, direction), rtol=1e-10, atol=1e-10
    )


def test_weight_tied_to_an_unknown_layer() -> None:
    """A rule for one of its two owners isn't enough."""
    model = tiny_model("llama")
    model.model.layers[0].mlp = Scale(model.model.layers[0].mlp, 16)
    model.model.layers[0].mlp.scale = model.model.norm.weight
    parameters = trainable(model)
    engine, oracle = make_engine(model, parameters), AutogradEngine(model, parameters)
    assert isinstance(engine, FactoredEngine)
    assert set(parameters) - engine.covered == {"model.layers.0.mlp.scale"}
    batch = random_batch()
    assert relative_error(engine.gram(batch), oracle.gram(batch)) < 1e-12


def test_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's layer is covered by registering its rule: in one place."""
    monkeypatch.setattr("entangle.scores.rules.RULES", dict(RULES))

    @register_rule(Scale)
    def scale(module: Scale, call: Call) -> dict[str, Term]:
        """Y = f(x) tanh(s): ds = sum_t g_t f(x_t) (1 - tanh(s)^2)."""
        slope = 1 - module.scale.tanh() ** 2
        return {"scale": vector((call.g * call.by_row(module.inner(call.input)) * slope).sum(1))}

    model, batch = tiny_model("llama"), random_batch()
    model.model.layers[0].mlp = Scale(model.model.layers[0].mlp, 16)
    parameters = {"model.layers.0.mlp.scale": model.model.layers[0].mlp.scale}
    engine = make_engine(model, parameters, engine="factored")
    assert relative_error(engine.gram(batch), AutogradEngine(model, parameters).gram(batch)) < 1e-12
    assert engine.notes == []


class Borrowing(nn.Linear):
    """A layer that works as a Linear, but whose weight another layer uses behind its back."""

    def __init__(self, victim: nn.Linear) -> None:
        super().__init__(victim.in_features, victim.out_features, bias=False, dtype=torch.float64)
        self.__dict__["victim"] = victim

    def forward(self, x: Tensor) -> Tensor:
        """Both weights at once."""
        return nn.functional.linear(x, self.weight) + nn.functional.linear(x, self.victim.weight)


def test_self_check_finds_what_no_rule_can_know() -> None:
    """A weight that is used outside its own layer: the rule is wrong, and the first batch shows it."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj = Borrowing(attention.v_proj)
    name = "model.layers.0.self_attn.v_proj.weight"
    probed = {n: p for n, p in trainable(model).items() if "k_proj" not in n or ".1." in n}
    batch = random_batch()
    strict = FactoredEngine(model, probed)
    for _ in range(2):  # having refused once, it doesn't give in
        with pytest.raises(UncoveredParameter, match=f"aren't reproduced by their rule: {name}"):
            strict.pairs(batch)
    engine = FactoredEngine(model, probed, fallback=True)
    oracle = AutogradEngine(model, probed)
    assert relative_error(engine.gram(batch), oracle.gram(batch)) < 1e-12
    assert set(probed) - engine.covered == {name}
    assert "aren't reproduced" in engine.notes[0]


def test_adapter_on_a_frozen_half() -> None:
    """Only the probed parameters count, whatever else requires a gradient."""
    model = with_lora(tiny_model("llama"))
    model.requires_grad_(True)
    probed = {n: p for n, p in trainable(model).items() if "layers.1" in n and "lora_A" in n}
    batch = random_batch()
    fast, slow = FactoredEngine(model, probed), AutogradEngine(model, probed)
    assert relative_error(fast.gram(batch), slow.gram(batch)) < 1e-12
