"""Ways in which a fast engine can be wrong without a word; each was seen in some engine."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from entangle.scores import AutogradEngine, FactoredEngine
from entangle.scores import ghost as ghost_form
from entangle.scores.ghost import Ghost, Kernels
from entangle.scores.logps import Rows
from entangle.scores.prefix import Split, attention_window, split_for
from entangle.scores.reduce import pair_block
from entangle.scores.rules import RULES, Call, RuleEntry, linear
from entangle.scores.terms import Outer, Score, Term
from tests.architectures import random_batch, select, tiny_model, trainable, with_lora
from tests.scores.test_architectures import pair_error, relative_error


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "gpt_neo"])
def test_windows_see_no_padding(name: str) -> None:
    """A window counts cache slots; unequal prompts in one batch must not move its edge."""
    model, batch = tiny_model(name), random_batch(prompts=2, seed=3)
    split = split_for(model, Rows.from_batch(batch), 2)
    assert attention_window(model) == 5
    assert len(set(batch.prompt_length.tolist())) > 1
    assert split is not None and not split.is_padded
    wide = split_for(tiny_model("llama"), Rows.from_batch(batch), 2)
    assert wide is not None and wide.is_padded
    fast, slow = (engine(model, trainable(model)).gram(batch) for engine in (FactoredEngine, AutogradEngine))
    assert relative_error(fast, slow) < 1e-6


def test_sharing_that_goes_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that the engine doesn't know of: the first batch shows it, whole rows are used, and it says so."""
    monkeypatch.setattr("entangle.scores.prefix.attention_window", lambda _: float("inf"))
    model, batch = tiny_model("mistral"), random_batch(prompts=4)
    engine = FactoredEngine(model, trainable(model))
    assert engine.notes == []
    assert relative_error(engine.gram(batch), AutogradEngine(model, trainable(model)).gram(batch)) < 1e-12
    assert len(engine.notes) == 1 and "not once (log-probs differ)" in engine.notes[0]


def test_every_way_of_running_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules on the first batch with scored rows, sharing on the first batch that shares; then never again."""
    model = tiny_model("llama")
    engine = FactoredEngine(model, trainable(model))
    passes = []
    record = FactoredEngine._record
    monkeypatch.setattr(
        FactoredEngine,
        "_record",
        lambda self, rows, split, *rest: passes.append(split is not None) or record(self, rows, split, *rest),
    )
    singles, groups = random_batch(group_size=1), random_batch()
    for batch, expected in (
        (singles, [False, False]),  # rules, the batch
        (singles, [False]),
        (groups, [False, True, True]),  # sharing against whole rows, the batch
        (groups, [True]),
    ):
        passes.clear()
        engine.gram(batch)
        assert passes == expected


def test_training_mode_with_checkpointing_and_dropout() -> None:
    """In train mode checkpointing drops the cache and dropout is live; eval mode is forced."""
    model, batch = with_lora(tiny_model("llama", attention_dropout=0.3), lora_dropout=0.5), random_batch()
    expected = AutogradEngine(model, trainable(model)).gram(batch)
    model.train()
    model.get_base_model().gradient_checkpointing_enable()
    model.get_base_model().enable_input_require_grads()
    engine = FactoredEngine(model, trainable(model))
    assert relative_error(engine.gram(batch), expected) < 1e-12
    assert engine.notes == [] and model.training


def test_layer_used_twice() -> None:
    """Its calls add up before squaring; no prompt can be shared, and the engine says so."""
    model, batch = tiny_model("llama").requires_grad_(True), random_batch()
    model.model.layers[1] = model.model.layers[0]
    engine, oracle = FactoredEngine(model, trainable(model)), AutogradEngine(model, trainable(model))
    assert pair_error(engine.pairs(batch, modules=True), oracle.pairs(batch, modules=True)) < 1e-12
    assert len(engine.notes) == 1 and "prompts are evaluated with every response" in engine.notes[0]


def test_padding_token_of_an_embedding() -> None:
    """The embedding's padding row gets no gradient, even where the token is real."""
    batch = random_batch()
    model = tiny_model("llama", pad_token_id=int(batch.input_ids[0, 0])).requires_grad_(True)
    fast, slow = (engine(model, trainable(model)).gram(batch) for engine in (FactoredEngine, AutogradEngine))
    assert relative_error(fast, slow) < 1e-12


def test_autocast_is_seen_and_kept_out_of_the_sums() -> None:
    """Under bfloat16 autocast: right within bfloat16, resolution says so, and dots are taken as without."""
    model, batch = with_lora(tiny_model("llama", torch.float32)), random_batch()
    exact = AutogradEngine(model, trainable(model)).gram(batch)
    engine = FactoredEngine(model, trainable(model))
    with torch.autocast("cpu", torch.bfloat16):
        pairs, gram = engine.pairs(batch), engine.gram(batch)
    assert pairs.geometry.resolution == 1.2e-2
    assert 1e-7 < relative_error(gram, exact) < 0.1
    assert engine.gram(batch).dtype == gram.dtype == torch.float64


def test_autocast_inside_the_model_is_seen() -> None:
    """Accelerate wraps the forward itself: no autocast is active around it, only the layers show it."""
    model, batch = with_lora(tiny_model("llama", torch.float32)), random_batch()
    inner = model.get_base_model()
    forward = inner.forward

    def wrapped(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    inner.forward = wrapped
    engine = FactoredEngine(model, trainable(model))
    assert engine.pairs(batch).geometry.resolution == engine.resolution == 1.2e-2


def test_inputs_are_prepared_once() -> None:
    """What depends on a call's input alone is one tensor for all its gradients: positions enter kernels once."""
    memo: dict[str, Tensor] = {}
    x, g = torch.randn(2, 3, 4).bfloat16(), torch.randn(2, 3, 5)
    first, second = (Call((x,), {}, (g * k,), 2, memo) for k in (1, 2))
    assert first.x is second.x and first.x.dtype == torch.float32
    assert first.once("u", lambda: x + 1) is second.once("u", lambda: x + 2)


def test_a_kernel_is_kept_for_the_very_same_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that read one tensor share its inner products; an equal shape isn't enough."""
    monkeypatch.setattr(ghost_form, "BLOCK", 2)
    kernels = Kernels()
    x, y = torch.randn(2, 3, 4), torch.randn(2, 2, 4)
    rows = kernels.of((x, y))
    assert [tuple(row.shape) for row in rows] == [(2, 2, 5), (2, 2, 3), (2, 1, 1)]
    assert kernels.of((x[:], y[:])) is rows
    for parts in ((x.clone(), y), (x,), (x, y, x), (x[:, :2], y)):
        assert kernels.of((x, y)) is not kernels.of(parts)
        joint = torch.cat(parts, 1)
        upper = torch.cat([F.pad(row, (joint.shape[1] - row.shape[2], 0)) for row in kernels.of(parts)], 1)
        torch.testing.assert_close((upper + upper.mT) / 2, joint @ joint.mT)


@pytest.mark.parametrize("shorter", [0, 1])
def test_digits_of_the_shorter_score(shorter: int) -> None:
    """A response that is all but certain has a score 1e5 times shorter: float32 keeps its square and the product."""
    prompt, *own = (torch.randn(1, s, 6) for s in (5, 3, 3))
    scales = [1e-5 if k == shorter else 1.0 for k in range(2)]
    terms = [
        tuple(Outer(scales[k] * torch.randn(1, u.shape[1], 7), u) for u in (prompt, own[k])) for k in range(2)
    ]
    score = Score((terms[0], terms[1]), (7, 6))
    ghost = Ghost.from_score(score, "right")
    assert ghost is not None
    w, l = (  # noqa: E741
        torch.stack([t.left.double()[0].T @ t.right.double()[0] for t in own_terms]).sum(0)  # pyright: ignore
        for own_terms in terms
    )
    exact = torch.stack(
        [(w * w).sum(), (l * l).sum(), (w * l).sum(), (w * (w - l)).sum(), (l * (l - w)).sum()]
    )
    lengths = exact[:2].sqrt()
    scale = torch.stack([exact[0], exact[1], lengths.prod(), *(lengths * (w - l).norm())])
    for block in (ghost.pair_block(Kernels()), pair_block(score, torch.ones(7, 6))):
        assert ((block[:, 0] - exact).abs() / scale).max() < 2e-6


def test_rules_run_outside_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their matrix products would be taken in bfloat16."""
    seen = set()

    def spy(module: torch.nn.Linear, call: Call) -> dict[str, Term]:
        seen.add(torch.is_autocast_enabled("cpu"))
        return linear(module, call)

    monkeypatch.setitem(RULES, torch.nn.Linear, RuleEntry(spy, frozenset({"weight", "bias"})))
    model, batch = tiny_model("llama", torch.float32).requires_grad_(True), random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        FactoredEngine(model, trainable(model)).pairs(batch)
    assert seen == {False}


def test_only_the_last_layer_is_probed() -> None:
    """Then no prompt gradient is needed at all, or only through the last layer's keys and values."""
    model, batch = tiny_model("llama"), random_batch()
    for part in (
        "layers.1.mlp",
        "layers.1.self_attn.k_proj",
        "lm_head",
        "norm.weight",
        "layers.1.self_attn.q",
    ):
        probed = {n: p for n, p in trainable(model).items() if part in n}
        fast, slow = FactoredEngine(model, probed), AutogradEngine(model, probed)
        assert relative_error(fast.gram(batch), slow.gram(batch)) < 1e-12, part


def test_cut_is_the_common_token_prefix() -> None:
    """Not the prompt's own tokens, which may merge with a response; never past the last prompt token."""
    batch = random_batch(prompts=2)
    rows = Rows.from_batch(batch)
    split = Split.from_rows(rows, 2)
    assert split.prefix_lengths.tolist() == [int(length) - 1 for length in batch.prompt_length]
    ids = batch.input_ids.clone()
    ids[2, 1] = 47  # the rejected row of prompt 0 differs in its second prompt token
    moved = Split.from_rows(Rows.from_batch(type(batch)(ids, *fields_after_ids(batch))), 2)
    assert moved.prefix_lengths.tolist() == [1, int(batch.prompt_length[1]) - 1]
    twice = Split.from_rows(Rows.from_batch(select(batch, [0, 1, 0, 1], 2)), 2)
    assert (
        twice.prefix_lengths.tolist() == split.prefix_lengths.tolist()
    )  # identical responses stay out of it


def test_rows_that_part_inside_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge at the prompt's border: what only looks shared is evaluated with each response, and scores are right."""
    always = partial(split_for, min_share=0.0)
    monkeypatch.setattr("entangle.scores.factored.split_for", always)
    batch, model = random_batch(prompts=2), with_lora(tiny_model("llama"))
    ids = batch.input_ids.clone()
    border = batch.prompt_length - 2
    ids[[2, 3], border] = (ids[[2, 3], border] - 3 + 1) % 45 + 3  # a token of the rejected rows' prompts
    batch = type(batch)(ids, *fields_after_ids(batch))
    split = always(model, Rows.from_batch(batch), 2)
    assert split is not None and (split.prefix_lengths == border).all()
    engine, oracle = FactoredEngine(model, trainable(model)), AutogradEngine(model, trainable(model))
    assert relative_error(engine.gram(batch), oracle.gram(batch)) < 1e-12
    assert engine.notes == []


def fields_after_ids(batch) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
    """The other tensors of a batch."""
    return batch.attention_mask, batch.completion_mask, batch.prompt_length


def test_short_prompts_arent_split() -> None:
    """Where sharing saves next to nothing, rows are run whole."""
    batch = random_batch(prompts=2)
    late = batch.completion_mask.clone()
    late[:, 1:] = batch.attention_mask[:, 1:]  # everything but the first token is scored
    rows = Rows.from_batch(type(batch)(batch.input_ids, batch.attention_mask, late, batch.prompt_length))
    assert split_for(tiny_model("llama"), rows, 2) is None
    assert split_for(tiny_model("llama"), Rows.from_batch(random_batch(group_size=1)), 1) is None
    ids = batch.input_ids.clone()
    ids[:2, 0], ids[2:, 0] = 3, 4
    unlike = Rows.from_batch(type(batch)(ids, *fields_after_ids(batch)))
    assert split_for(tiny_model("llama"), unlike, 2, min_share=0.0) is None  # no token in common


def test_row_without_scored_tokens() -> None:
    """Its score is zero; its partner's isn't touched."""
    model, batch = tiny_model("gpt2").requires_grad_(True), random_batch()
    empty = batch.completion_mask.clone()
    empty[4] = 0
    batch = type(batch)(batch.input_ids, batch.attention_mask, empty, batch.prompt_length)
    fast, slow = (engine(model, trainable(model)).gram(batch) for engine in (FactoredEngine, AutogradEngine))
    assert (fast[4] == 0).all() and (slow[4] == 0).all()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)
    nothing = type(batch)(batch.input_ids, batch.attention_mask, empty * 0, batch.prompt_length)
    assert (FactoredEngine(model, trainable(model)).gram(nothing) == 0).all()


@pytest.mark.parametrize("group_size", [2, 3, 9])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_many_answers_to_one_prompt_after_an_ordinary_batch(name: str, group_size: int) -> None:
    """Gradients of K backward passes must not be summed up in the storage of one that was recorded."""
    model = tiny_model(name)
    parameters = dict(model.named_parameters())
    engine = FactoredEngine(model, parameters)
    engine.pairs(random_batch())  # the self-check of the first batch sees two answers per prompt
    batch = random_batch(prompts=2, group_size=group_size, seed=5)
    expected = AutogradEngine(model, parameters).gram(batch)
    scale = (expected.diag()[:, None] * expected.diag()).sqrt()
    assert ((engine.gram(batch) - expected).abs() / scale).max() < 1e-9
