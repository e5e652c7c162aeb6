"""Sums gathered in the pass equal those of the scores written out, whatever the engine, the layers and the passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from entangle.scores import AutogradEngine, Engine, FactoredEngine, reduce
from entangle.scores.rows import RowBatch
from entangle.scores.sums import GroupSums, SumGram, memory
from tests.architectures import random_batch, select, trainable
from tests.scores.test_architectures import CASES, FLOAT32_INSIDE, probed_model
from tests.scores.test_engines import ENGINES

pytestmark = pytest.mark.filterwarnings("ignore:.*_pattern keys.*:RuntimeWarning")  # PEFT, expert banks

GROUPS, PROMPTS = [0, 1, 0, 2], ["a", "b", "a", "c"]


def expected(
    model: nn.Module,
    batch: RowBatch,
    groups: Sequence[int],
    prompts: Sequence[str],
    *,
    weights: Tensor | None = None,
    metric: dict[str, Tensor] | None = None,
    modules: str = "",
) -> SumGram:
    """By the definition, from the oracle's scores; `weights` `(D, 2n)`; parameters under `modules` alone."""
    n, count = len(groups), max(groups) + 1
    if weights is None:
        weights = torch.block_diag(torch.ones(1, n), torch.ones(1, n)).double()
    written = {k: v for k, v in AutogradEngine(model, trainable(model)).scores(batch).items() if modules in k}
    theta = torch.cat([value.double() for value in written.values()], 1)
    ones = {k: torch.ones_like(value[0]) for k, value in written.items()}
    p = torch.cat([ones[k].double() if metric is None else metric[k].ravel() for k in written])

    def total(pairs: list[int]) -> Tensor:
        rows = [*pairs, *(i + n for i in pairs)]
        return weights[:, rows] @ theta[rows]

    sums = torch.stack([total([i for i in range(n) if groups[i] == g]) for g in range(count)])
    own, squares = torch.zeros(count, len(weights), len(weights)).double(), torch.zeros(count).long()
    held = torch.zeros_like(squares)
    for prompt, g in {(q, g) for q, g in zip(prompts, groups, strict=True) if g >= 0}:
        part = total(members := [i for i in range(n) if prompts[i] == prompt])
        own[g] += part * p @ part.T
        squares[g] += len(members) ** 2
        held[g] += 1
    pairs = torch.tensor([groups.count(g) for g in range(count)])
    return SumGram(torch.einsum("gdt,t,het->gdhe", sums, p, sums), own, pairs, squares, held)


def assert_same(found: SumGram, wanted: SumGram, tolerance: float = 1e-10) -> None:
    scale = float(wanted.products.abs().max())
    torch.testing.assert_close(found.products, wanted.products, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(found.own, wanted.own, rtol=0, atol=tolerance * scale)
    assert found.prompts.tolist() == wanted.prompts.tolist()
    assert found.pairs.tolist() == wanted.pairs.tolist() and found.squares.tolist() == wanted.squares.tolist()


def one_pass(engine: Engine, batch: RowBatch, **options: object) -> GroupSums:
    sums = GroupSums(engine.parameters, 3)
    engine.pairs(batch, sums=sums.of_pass(torch.tensor(GROUPS), PROMPTS), **options)  # pyright: ignore
    return sums


@pytest.mark.parametrize("form", ["cheaper", "factored"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_layer_rule(name: str, kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters and LoRA; shared prompts; written out, and as factors wherever they are there."""
    if form == "factored":
        monkeypatch.setattr(reduce, "SUMMED_PASS_COST", 1e9)
    model, batch = probed_model(name, kind), random_batch(prompts=4)
    engine = FactoredEngine(model, trainable(model), fallback=True)
    found = one_pass(engine, batch).gram()
    assert_same(found, expected(model, batch, GROUPS, PROMPTS), 1e-6 if name in FLOAT32_INSIDE else 1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["all", "lora"])
@pytest.mark.parametrize("name", list(ENGINES))
def test_every_engine_in_every_metric_by_module(name: str, kind: str, weighted: bool) -> None:
    """Tied weights, prompts shared or not, the oracle; the module's part is that of its parameters alone."""
    model, batch = probed_model("llama_tied", kind), random_batch(prompts=4)
    metric = {k: torch.rand_like(p) + 0.1 for k, p in trainable(model).items()} if weighted else None
    engine = ENGINES[name](model, trainable(model))
    sums = one_pass(engine, batch, metric=metric)
    assert_same(sums.gram(metric), expected(model, batch, GROUPS, PROMPTS, metric=metric))
    parts = sums.module_grams(metric)
    module = next(m for m in parts if "layers.1" in m and "down_proj" in m)
    assert_same(parts[module], expected(model, batch, GROUPS, PROMPTS, metric=metric, modules=module + "."))
    assert parts.keys() == (engine.pairs(batch, modules=True).modules or {}).keys()


@pytest.mark.parametrize("name", list(ENGINES))
def test_weights_from_the_log_probs_of_the_pass(name: str) -> None:
    """A third direction, such as a loss's gradient: its weights are asked for once the log-probs are known."""
    model, batch = probed_model("gpt2", "all"), random_batch(prompts=4)
    engine = ENGINES[name](model, trainable(model))
    sums = GroupSums(engine.parameters, 3, directions=3)

    def push(logps: Tensor) -> Tensor:
        return torch.cat([logps[:4].sigmoid(), -logps[4:].exp()])[None]

    scores = engine.pairs(batch, sums=sums.of_pass(torch.tensor(GROUPS), PROMPTS, push))
    weights = torch.cat([torch.block_diag(torch.ones(1, 4), torch.ones(1, 4)), push(scores.logps)])
    assert_same(sums.gram(), expected(model, batch, GROUPS, PROMPTS, weights=weights))


def test_a_pass_without_sums_is_the_same_pass() -> None:
    model, batch = probed_model("llama", "lora"), random_batch(prompts=4)
    engine = FactoredEngine(model, trainable(model))
    plain, summed = (
        engine.pairs(batch),
        engine.pairs(batch, sums=GroupSums(engine.parameters, 3).of_pass(torch.tensor(GROUPS), PROMPTS)),
    )
    assert torch.equal(plain.logps, summed.logps)
    torch.testing.assert_close(plain.geometry.inner, summed.geometry.inner, rtol=1e-12, atol=1e-12)


def test_passes_shards_and_a_file_add_up(tmp_path) -> None:
    """Pass by pass, in two processes, saved and loaded in between: as one pass, whose prompts are each in one."""
    model, batch = probed_model("llama", "lora"), random_batch(prompts=4)
    engine = FactoredEngine(model, trainable(model))
    halves = [GroupSums(engine.parameters, 3, shards=[k]) for k in range(2)]
    for sums, pairs in zip(halves, ([0, 2], [1, 3]), strict=True):
        part = select(batch, [*pairs, *(i + 4 for i in pairs)], 2)
        engine.pairs(
            part, sums=sums.of_pass(torch.tensor([GROUPS[i] for i in pairs]), [PROMPTS[i] for i in pairs])
        )
        sums.save(tmp_path / "sums.safetensors")
        assert [file.name for file in tmp_path.iterdir()] == ["sums.safetensors"]
        halves[halves.index(sums)] = GroupSums.load(tmp_path / "sums.safetensors", engine.parameters)
    halves[0].merge(halves[1])
    assert_same(halves[0].gram(), expected(model, batch, GROUPS, PROMPTS))
    assert halves[0].shards == {0, 1} and halves[0].pairs == 4 and halves[0].prompts == 3
    with pytest.raises(ValueError, match="over other shards than"):
        halves[0].merge(halves[1])


def test_a_prompt_in_two_passes_is_said_to_be() -> None:
    """Its pairs' products with each other were never met: its group's own terms aren't known, other groups' are."""
    model, batch = probed_model("llama", "lora"), random_batch(prompts=4)
    engine = FactoredEngine(model, trainable(model))
    sums = GroupSums(engine.parameters, 3)
    for pairs in ([0, 1], [2, 3]):
        part = select(batch, [*pairs, *(i + 4 for i in pairs)], 2)
        engine.pairs(
            part, sums=sums.of_pass(torch.tensor([GROUPS[i] for i in pairs]), [PROMPTS[i] for i in pairs])
        )
    found, wanted = sums.gram(), expected(model, batch, GROUPS, PROMPTS)
    torch.testing.assert_close(found.products, wanted.products, rtol=1e-10, atol=1e-10)
    assert found.own[0].isnan().all()
    torch.testing.assert_close(found.own[1:], wanted.own[1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("broken", [0, 2, 3])  # a twin, a twin, a pair whose prompt has no other
@pytest.mark.parametrize("at", ["model.embed_tokens", "gradient"])
@pytest.mark.parametrize("name", list(ENGINES))
def test_a_broken_pair_is_in_no_sum(name: str, at: str, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the forward pass, or in the backward pass alone after a part of the score was added already."""
    model, batch = probed_model("llama", "all"), random_batch(prompts=4, seed=2)
    others = [i for i in range(4) if i != broken]
    kept = select(batch, [*others, *(i + 4 for i in others)], 2)
    wanted = expected(model, kept, [GROUPS[i] for i in others], [PROMPTS[i] for i in others])
    side = max(broken, broken + 4, key=lambda i: int(batch.lengths[i]))
    assert int(batch.lengths[side]) > 1  # or its token is only predicted, never read
    batch.input_ids[side, batch.prompt_length[broken]] = 2  # a token that nobody else has
    if at == "gradient":
        model.model.layers[0].register_full_backward_hook(Spoil(model))
    else:
        with torch.no_grad():
            model.model.embed_tokens.weight[2] = torch.nan
    engine = ENGINES[name](model, trainable(model))
    found = one_pass(engine, batch).gram()
    scale = float(wanted.products.abs().max())
    count = len(wanted.pairs)  # the last group may be empty now
    torch.testing.assert_close(found.products[:count, :, :count], wanted.products, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(found.own[:count], wanted.own, rtol=0, atol=1e-10 * scale)
    assert float(found.products[count:].abs().sum()) < 1e-12 * scale
    assert found.pairs[:count].tolist() == wanted.pairs.tolist() and int(found.pairs.sum()) == 3
    assert found.squares[:count].tolist() == wanted.squares.tolist()


class Spoil:
    """A gradient that becomes NaN below a layer, at the positions of token 2."""

    def __init__(self, model: nn.Module) -> None:
        self.mask: Tensor | None = None
        model.model.embed_tokens.register_forward_hook(self.see)

    def see(self, _: nn.Module, args: tuple[Tensor], __: Tensor) -> None:
        self.mask = (args[0] == 2)[..., None]

    def __call__(self, _: nn.Module, grads: tuple[Tensor, ...], __: object) -> tuple[Tensor | None, ...]:
        return tuple(
            grad
            if grad is None or grad.shape[:2] != self.mask.shape[:2]
            else grad.masked_fill(self.mask, torch.nan)
            for grad in grads
        )


def test_refusals() -> None:
    model = probed_model("gpt2", "lora")
    sums = GroupSums(trainable(model), 2)
    assert memory(trainable(model), 2) == 2 * 2 * 8 * sum(p.numel() for p in trainable(model).values())
    with pytest.raises(ValueError, match="group from -1 to 1 for every pair"):
        sums.of_pass(torch.tensor([0, 2]), ["a", "b"])
    with pytest.raises(ValueError, match="those of 'a' are in two"):
        sums.of_pass(torch.tensor([0, 1]), ["a", "a"])
    with pytest.raises(ValueError, match="weights for 0 further directions"):
        sums.of_pass(torch.tensor([0, 1]), ["a", "b"], lambda logps: logps[None])
