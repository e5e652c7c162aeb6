"""Diagnostics against oracles by hand, in float64, on tiny models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from entangle.diagnostics import DIAGNOSTICS, columns_of, compute, diagnostic, resolve
from entangle.errors import ConfigError
from entangle.models import AdapterOff, Itself, NoReference, Policy, adapter_off
from entangle.models.reference import Reference
from entangle.scores import AutogradEngine, row_logps
from entangle.scores.rows import RowBatch
from tests.architectures import random_batch, select, tiny_model, trainable, with_lora

pytestmark = pytest.mark.usefixtures("keeping_float64")


def policy_of(model: nn.Module, reference: Reference | None = None) -> Policy:
    return Policy(model, None, trainable(model), reference or Itself(model))  # pyright: ignore[reportArgumentType]


def plain_rows(batch: RowBatch) -> list[tuple[Tensor, int]]:
    """Each row without padding, and where its response begins."""
    rows = []
    for ids, real, scored in zip(batch.input_ids, batch.attention_mask, batch.completion_mask, strict=True):
        tokens = ids[real.bool()]
        rows.append((tokens, len(tokens) - int(scored.sum())))
    return rows


@torch.no_grad()
def alone(model: nn.Module, tokens: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, log-softmax and targets at the positions that predict a response, from the row by itself."""
    output = model(input_ids=tokens[None], output_hidden_states=True)
    cut = slice(start - 1, len(tokens) - 1)
    return output.hidden_states[-1][0, cut], output.logits[0, cut].log_softmax(-1), tokens[start:]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_forward_diagnostics_equal_what_each_row_says_alone(name, side):
    model = tiny_model(name)
    batch = random_batch(prompts=4, side=side)
    found = compute(["ches", "hidden_inner", "confidence", "length_ratio"], policy_of(model), batch)
    rows = plain_rows(batch)
    for i in range(4):
        h_w, p_w, y_w = alone(model, *rows[i])
        h_l, p_l, y_l = alone(model, *rows[4 + i])
        H_w, H_l, n_w, n_l = h_w.sum(0), h_l.sum(0), len(y_w), len(y_l)
        expected = {
            "ches": H_w @ H_l - H_w @ H_w,
            "ches_norm": H_w @ H_l / (n_w * n_l) - H_w @ H_w / n_w**2,
            "hidden_inner": h_w[-1] @ h_l[-1],
            "confidence_chosen": p_w[torch.arange(n_w), y_w].mean().exp(),
            "confidence_rejected": p_l[torch.arange(n_l), y_l].mean().exp(),
            "entropy_chosen": -(p_w.exp() * p_w).sum(1).mean(),
            "entropy_rejected": -(p_l.exp() * p_l).sum(1).mean(),
            "length_ratio": torch.tensor(n_l / n_w),
        }
        assert set(expected) == set(found)
        for column, value in expected.items():
            assert found[column][i].item() == pytest.approx(value.item(), rel=1e-9), (column, i)


@pytest.mark.parametrize("name", list(DIAGNOSTICS))
def test_numbers_depend_neither_on_padding_nor_on_the_other_pairs(name):
    model = with_lora(tiny_model("gpt2"))
    policy = policy_of(model, AdapterOff(model))  # pyright: ignore[reportArgumentType]
    batch = random_batch(prompts=3)
    together = compute([name], policy, batch)
    assert tuple(together) == DIAGNOSTICS[name].columns
    padded = compute([name], policy, random_batch(prompts=3, side="left", padding=7))
    for column, values in together.items():
        assert values.dtype == torch.float64 and values.shape == (3,)
        torch.testing.assert_close(padded[column], values, rtol=1e-9, atol=1e-12)
    for i in range(3):
        single = compute([name], policy, select(batch, [i, 3 + i], 2))
        for column, values in together.items():
            torch.testing.assert_close(single[column], values[i : i + 1], rtol=1e-9, atol=1e-12)


def pair_of(prompt: list[int], chosen: list[int], rejected: list[int]) -> RowBatch:
    width = len(prompt) + max(len(chosen), len(rejected))
    rows = [prompt + response for response in (chosen, rejected)]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    places = torch.arange(width)
    attention = torch.stack([places < len(row) for row in rows]).long()
    return RowBatch(ids, attention, attention * (places >= len(prompt)), torch.tensor([len(prompt)]))


def test_ches_of_single_tokens_is_zero():
    found = compute(["ches"], policy_of(tiny_model("llama")), pair_of([3, 4, 5], [6], [7]))
    assert found["ches"].abs().item() < 1e-12 and found["ches_norm"].abs().item() < 1e-12


def test_ches_of_half_precision_does_not_overflow():
    """States of about 1000 in float16: their squared sum is beyond 65504."""
    exact, batch = tiny_model("llama"), random_batch(prompts=3)
    with torch.no_grad():
        exact.get_submodule("model.norm").weight.fill_(1000.0)  # pyright: ignore[reportCallIssue]
    half = tiny_model("llama")
    half.load_state_dict(exact.state_dict())
    expected = compute(["ches"], policy_of(exact), batch)
    found = compute(["ches"], policy_of(half.half()), batch)
    assert expected["ches"].abs().max() > 1e6
    for column, values in found.items():
        torch.testing.assert_close(values, expected[column], rtol=0.05, atol=0.01 * 1e6)


@pytest.mark.parametrize(
    ("chosen", "rejected", "distance", "prefix", "suffix"),
    [
        ([4, 5, 6, 7], [4, 5, 6, 7], 0.0, 4, 0),
        ([4, 5, 6, 7], [4, 9, 6, 7], 0.25, 1, 2),
        ([4, 5, 6, 7], [5, 6, 7], 0.25, 0, 3),
        ([4, 4, 4], [4, 4], 1 / 3, 2, 0),
        ([4, 5], [8, 9, 10, 11], 1.0, 0, 0),
        ([4, 5, 6], [6, 5, 4], 2 / 3, 0, 0),
    ],
)
def test_token_diagnostics_by_hand(chosen, rejected, distance, prefix, suffix):
    batch = pair_of([3, 3], chosen, rejected)
    found = compute(["edit_distance", "overlap", "length_ratio"], policy_of(tiny_model("llama")), batch)
    assert found["edit_distance"].item() == pytest.approx(distance)
    assert (found["shared_prefix"].item(), found["shared_suffix"].item()) == (prefix, suffix)
    assert found["length_ratio"].item() == pytest.approx(len(rejected) / len(chosen))


def test_reward_gap_is_the_difference_of_log_ratios():
    model, batch = with_lora(tiny_model("llama")), random_batch(prompts=3, side="left")
    found = compute(["reward_gap"], policy_of(model, AdapterOff(model)), batch)["reward_gap"]  # pyright: ignore
    with adapter_off(model):  # pyright: ignore[reportArgumentType]
        reference = row_logps(model, batch)
    chosen, rejected = (row_logps(model, batch) - reference).chunk(2)
    torch.testing.assert_close(found, chosen - rejected)
    assert found.abs().min() > 1e-6
    assert compute(["reward_gap"], policy_of(model), batch)["reward_gap"].abs().max() < 1e-12
    assert compute(["reward_gap"], policy_of(model, NoReference()), batch)["reward_gap"].isnan().all()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_squeezing_is_what_a_small_step_does_to_the_likeliest_tokens(lora):
    """Central differences along g_w - g_l, of the log-probs of the tokens that were the likeliest before.

    On GPT-2, whose norms keep float64 (Llama's work in float32, too coarse for differences).
    """
    model = with_lora(tiny_model("gpt2")) if lora else tiny_model("gpt2")
    policy, batch = policy_of(model), random_batch(prompts=2, seed=3)
    found = compute(["squeezing"], policy, batch)
    rows, scores = plain_rows(batch), AutogradEngine(model, policy.parameters).scores(batch)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}

    def total(row: int, tokens: Tensor | None) -> tuple[float, Tensor]:
        _, logps, _ = alone(model, *rows[row])
        tokens = logps.argmax(-1) if tokens is None else tokens
        return logps.gather(1, tokens[:, None]).sum().item(), tokens

    for i in range(2):
        for side, row in (("chosen", i), ("rejected", 2 + i)):
            _, likeliest = total(row, None)
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    for name, parameter in policy.parameters.items():
                        difference = (scores[name][i] - scores[name][2 + i]).reshape(parameter.shape)
                        parameter.copy_(before[name] + step * difference)
                values.append(total(row, likeliest)[0])
            with torch.no_grad():
                for name, parameter in policy.parameters.items():
                    parameter.copy_(before[name])
            change = (values[0] - values[1]) / 2e-6
            assert found[f"squeezing_{side}"][i].item() == pytest.approx(change, rel=1e-5, abs=1e-6)


def test_model_is_left_as_it_was_found():
    model = with_lora(tiny_model("llama")).train()
    policy = policy_of(model, AdapterOff(model))  # pyright: ignore[reportArgumentType]
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    compute(["all"], policy, random_batch())
    assert model.training and all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        needed, value = before[name]
        assert parameter.requires_grad == needed and parameter.grad is None
        assert torch.equal(parameter, value)


def test_names_are_checked_and_all_stands_for_every_one():
    assert resolve(["ches", "ches"]) == ("ches",)
    assert resolve(["all", "ches"]) == tuple(DIAGNOSTICS)
    assert columns_of(["overlap", "ches"]) == ("shared_prefix", "shared_suffix", "ches", "ches_norm")
    with pytest.raises(ConfigError, match="Unknown diagnostic 'chess'. Known: ches, "):
        resolve(["chess"])
    with pytest.raises(ValueError, match="ches_norm exists already"):
        diagnostic("other", "ches_norm", description="", formula="", cost="tokens")(lambda _: {})
    with pytest.raises(ValueError, match="2 responses per prompt"):
        compute(["ches"], policy_of(tiny_model("llama")), random_batch(group_size=3))
