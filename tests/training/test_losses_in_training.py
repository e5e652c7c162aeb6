"""Every loss of the catalogue under the trainer: its value, what it is refused, what it logs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from trl import DPOTrainer

from entangle.errors import UserError
from entangle.training import PreferenceTrainer, TrainingError, incentives, is_still_training
from losses import (
    CATALOGUE,
    DPO,
    DPOP,
    LDDPO,
    WPO,
    Hinge,
    PairLogps,
    PreferenceLoss,
    SimPO,
    TokenLogps,
    UnknownLoss,
    WeightedSum,
    WithSFT,
    build,
)
from tests.training import runs

REFUSED = {"tdpo1", "tdpo2"}
TRAINABLE = sorted(set(CATALOGUE) - REFUSED)
THREE_STEPS = ["ipo", "simpo", "orpo", "dpop", "kto", "aot", "with_sft", "ld_dpo", "wpo"]


def independent(batch: dict[str, Tensor]) -> PairLogps:
    """The batch under the policy (seed 0) and the reference (seed 1), from plain logits of fresh models."""
    with torch.no_grad():
        policy, reference = (runs.plain_logps(runs.policy(seed), batch)[1] for seed in (0, 1))
        logits = runs.policy(0)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        collision = torch.logsumexp(2 * torch.log_softmax(logits, -1), -1)
    mask = batch["completion_mask"][:, 1:].bool()
    half = len(mask) // 2
    return TokenLogps(
        chosen=policy[:half],
        rejected=policy[half:],
        mask_chosen=mask[:half],
        mask_rejected=mask[half:],
        ref_chosen=reference[:half],
        ref_rejected=reference[half:],
        log_collision_chosen=collision[:half],
        log_collision_rejected=collision[half:],
    ).pairs()


def two_models(folder: Path, loss: Any, **options: Any) -> DPOTrainer:
    """Full fine-tuning of policy seed 0 against reference seed 1: the log-ratios aren't 0 at the start."""
    defaults = {"ref_model": runs.policy(1), "peft_config": None, "loss": loss, "args": {"max_steps": 3}}
    return runs.trainer(folder, **(defaults | options))


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[DPOTrainer, dict[str, Tensor], PairLogps]]:
    """A trainer whose head gives all that any loss reads, one batch, and its independent log-probs."""
    trainer = two_models(tmp_path_factory.mktemp("shared"), WPO())
    batch = runs.collated(trainer, range(6))
    yield trainer, batch, independent(batch)


@pytest.mark.parametrize("name", TRAINABLE)
def test_loss_is_the_mean_of_per_pair(shared: tuple[Any, dict[str, Tensor], PairLogps], name: str) -> None:
    """`compute_loss` of every trainable loss equals the mean of `per_pair` on independent log-probs.

    Tolerance: float32 log-probs of about 40 nats by two ways of summing.
    """
    trainer, batch, logps = shared
    trainer.loss = build(name)
    expected = trainer.loss.per_pair(logps).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", THREE_STEPS)
def test_three_steps(name: str, tmp_path: Path) -> None:
    """A run of three steps begins with the loss of its first batch and moves the weights."""
    batches: list[dict[str, Tensor]] = []

    class Recording(PreferenceTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
            batches.append({key: value.clone() for key, value in inputs.items()})
            return super().compute_loss(model, inputs, *rest, **options)

    trainer = two_models(tmp_path, {"name": name}, cls=Recording)
    before = runs.digest(trainer.model)
    trainer.train()
    losses = runs.logged(trainer, "loss")
    assert losses[0] == pytest.approx(float(build(name).per_pair(independent(batches[0])).mean()), rel=2e-5)
    assert len(losses) == len(batches) == 3
    assert all(map(math.isfinite, losses))
    assert runs.digest(trainer.model) != before


@pytest.mark.parametrize(
    ("loss", "args"),
    [
        (LDDPO(alpha=0.3), {"ld_alpha": 0.3}),
        (WPO(beta=0.1, max_weight=math.inf), {"use_weighting": True}),
        (WeightedSum(), {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_same_run_as_trl(loss: PreferenceLoss, args: dict[str, Any], tmp_path: Path) -> None:
    """Losses that read tokens or couple the batch follow TRL's own through a run, but for round-off."""
    theirs = runs.trainer(tmp_path, DPOTrainer, args=args)
    ours = runs.trainer(tmp_path, loss=loss)
    theirs.train()
    ours.train()
    assert runs.logged(ours, "loss") == pytest.approx(runs.logged(theirs, "loss"), rel=1e-3)


def forwards(trainer: DPOTrainer) -> int:
    """How often the run sends a batch through any model."""
    calls = []
    models = [trainer.model] + ([] if trainer.ref_model is None else [trainer.ref_model])
    hooks = [model.register_forward_pre_hook(lambda *_: calls.append(1)) for model in models]
    trainer.train()
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_no_reference_forward_without_need(tmp_path: Path) -> None:
    """Four steps of SimPO are four forwards, of DPO eight, or four with the reference's columns at hand."""
    assert forwards(runs.trainer(tmp_path, loss=SimPO(), args={"max_steps": 4})) == 4
    assert forwards(runs.trainer(tmp_path, loss=DPO(), args={"max_steps": 4})) == 8
    columns = {"max_steps": 4, "precompute_ref_log_probs": True}
    assert forwards(runs.trainer(tmp_path, loss=DPO(), args=columns)) == 4


def test_no_reference_model_without_need(tmp_path: Path) -> None:
    """Neither a second model nor a copy of a ready adapter is made; TRL would look for one on the hub."""
    trainer = runs.trainer(tmp_path, loss="simpo", peft_config=None, args={"max_steps": 2})
    assert trainer.ref_model is None
    trainer.train()
    ready = get_peft_model(runs.policy(), runs.LORA)
    assert list(runs.trainer(tmp_path, model=ready, peft_config=None, loss="simpo").model.peft_config) == [
        "default"
    ]
    with pytest.raises((OSError, ValueError), match="(?i)repo id|identifier|path|connect"):
        runs.trainer(tmp_path, loss="dpo", peft_config=None)


def test_rewards_are_logged_where_there_is_a_reference(tmp_path: Path) -> None:
    """A loss without a reference logs no rewards, unless the user precomputed the reference's log-probs."""
    without = runs.trainer(tmp_path, loss="simpo", args={"max_steps": 2})
    without.train()
    assert not runs.logged(without, "rewards/margins")
    with_columns = runs.trainer(
        tmp_path, loss="simpo", args={"max_steps": 2, "precompute_ref_log_probs": True}
    )
    with_columns.train()
    assert runs.logged(with_columns, "rewards/margins")[1] != 0


def test_loss_by_name(tmp_path: Path) -> None:
    """A loss is an object, a name, a mapping from YAML, or DPO at args.beta."""
    assert runs.trainer(tmp_path, loss="simpo").loss == SimPO()
    assert runs.trainer(tmp_path, loss={"name": "simpo", "beta": 2.5}).loss == SimPO(beta=2.5)
    assert runs.trainer(tmp_path, args={"beta": 0.3}).loss == DPO(beta=0.3)
    assert runs.trainer(tmp_path, args={"beta": 0.3}, loss=DPO(beta=0.3)).reward_beta == 0.3
    with pytest.raises(UnknownLoss, match="Known losses: .*simpo"):
        runs.trainer(tmp_path, loss="simppo")


@pytest.mark.parametrize(
    ("loss", "args", "message"),
    [
        (
            None,
            {"loss_type": "ipo"},
            r"args.loss_type=\['ipo'\] belongs to the loss.*related losses: ipo_avg\.",
        ),
        (DPO(), {"loss_type": ["sigmoid", "sft"]}, r"args.loss_type=.*dpo.*sft_batch"),
        (DPO(), {"label_smoothing": 0.1}, r"args.label_smoothing=0.1 belongs.*at 0.0 .*cdpo"),
        (DPO(), {"ld_alpha": 0.5}, r"args.ld_alpha=0.5 belongs.*ld_dpo"),
        (DPO(), {"use_weighting": True}, r"args.use_weighting=True belongs.*wpo"),
        (WPO(), {"use_weighting": True}, r"args.use_weighting=True belongs.*wpo"),
        (DPO(), {"f_divergence_type": "js_divergence"}, r"args.f_divergence_type=.*f_dpo_js"),
        (DPO(), {"discopop_tau": 0.1}, r"args.discopop_tau=0.1 belongs.*discopop"),
        (DPO(), {"loss_weights": [2.0]}, r"args.loss_weights=\[2.0\] belongs.*weighted_sum"),
        (SimPO(), {"beta": 0.3}, r"args.beta=0.3 contradicts the loss simpo"),
        (
            LDDPO(),
            {"precompute_ref_log_probs": True},
            r"'ld_dpo' reads the reference's log-prob of every token",
        ),
    ],
)
def test_contradicting_options_are_refused(
    loss: Any, args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """An option that the loss would ignore is named, with its value and where to say it."""
    with pytest.raises(TrainingError, match=message) as caught:
        runs.trainer(tmp_path, loss=loss, args=args)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("loss", [*sorted(REFUSED), {"name": "with_sft", "loss": "tdpo1"}], ids=str)
def test_what_needs_whole_distributions_is_refused(loss: Any, tmp_path: Path) -> None:
    """Before anything is loaded, with the loss's name, the missing statistic and the reason."""
    with pytest.raises(TrainingError, match=r"can't train .*tdpo.*kl_chosen.*builds no logits"):
        runs.trainer(tmp_path, loss=loss)


def test_users_arguments_stay_as_given(tmp_path: Path) -> None:
    """WPO needs an option of TRL switched on; the caller's own DPOConfig isn't touched."""
    args = runs.arguments(tmp_path)
    trainer = runs.trainer(tmp_path, loss=WPO())
    PreferenceTrainer(
        runs.policy(),
        None,
        args,
        loss=WPO(),
        train_dataset=runs.pairs(),
        processing_class=runs.tokenizer(),
        peft_config=runs.LORA,
    )
    assert not args.use_weighting
    assert trainer.args.use_weighting


def test_metrics_of_a_run(tmp_path: Path) -> None:
    """At the first step of LoRA the policy is its reference: d = beta/2, all pairs train, no reward."""
    args = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = runs.trainer(tmp_path, loss=DPO(beta=0.2), args=args, eval_dataset=runs.pairs(5))
    trainer.train()
    train, evaluation = trainer.state.log_history[:2]
    assert train["entangle/incentive_chosen"] == pytest.approx(0.1)
    assert train["entangle/incentive_rejected"] == pytest.approx(0.1)
    assert train["entangle/still_training"] == 1
    assert train["rewards/margins"] == 0
    assert {"eval_" + key for key in train if "/" in key} <= set(evaluation)
    assert evaluation["eval_entangle/incentive_chosen"] < 0.1
    assert evaluation["eval_rewards/margins"] > 0


def test_metrics_against_a_hand_count(tmp_path: Path) -> None:
    """Untouched policy, evaluated: summed and per-token means over pairs, from plain logits."""
    trainer = runs.trainer(tmp_path, loss=DPO(), eval_dataset=runs.pairs(16))
    batch = runs.collated(trainer, range(16))
    with torch.no_grad():
        sums, _ = runs.plain_logps(runs.policy(), batch)
    lengths = batch["completion_mask"].sum(1)
    found = trainer.evaluate()
    expected = {
        "eval_logps/chosen": float(sums[:16].mean()),
        "eval_logps/rejected": float(sums[16:].mean()),
        "eval_entangle/logps_per_token/chosen": float((sums / lengths)[:16].mean()),
        "eval_entangle/logps_per_token/rejected": float((sums / lengths)[16:].mean()),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def at(margins: list[float], loss: PreferenceLoss, reference: bool = True) -> list[bool]:
    """Which pairs still train when the chosen log-prob stands `margins` above the reference's."""
    base = torch.full((len(margins),), -20.0, dtype=torch.float64)
    length = torch.full_like(base, 10)
    logps = PairLogps(base + torch.tensor(margins), base, length, length)
    if reference:
        logps = replace(logps, ref_chosen=base, ref_rejected=base)
    return is_still_training(loss, logps).tolist()


def test_still_training() -> None:
    """DPO: s(-beta D) > 0.01 * 1/2, that is D < 52.933 at beta 0.1. Hinge: D < 10. SimPO: see below."""
    edge = math.log(1 / 0.005 - 1) / 0.1
    assert at([0, edge - 0.01, edge + 0.01, -100], DPO(beta=0.1)) == [True, True, False, True]
    assert at([0, 9.99, 10.01], Hinge(beta=0.1)) == [True, True, False]
    start = 1 / (1 + math.exp(-1.0))  # s(gamma), the incentive over beta/n where both are equally likely
    edge = 10 * (math.log(1 / (0.01 * start) - 1) + 1.0) / 2.0
    loss = SimPO(beta=2.0, gamma=1.0)
    assert at([0, edge - 0.01, edge + 0.01], loss, reference=False) == [True, True, False]
    assert at([0, 100], build("sft"), reference=False) == [True, True]


def test_incentives_of_a_token_loss_are_means_over_tokens() -> None:
    """LD-DPO at alpha 1 is DPO: one incentive on every token, whose mean is DPO's."""
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (-torch.rand(3, width, generator=generator) for width in (5, 7))
    masks = torch.arange(5) < torch.tensor([[5], [2], [3]]), torch.arange(7) < torch.tensor([[7], [6], [1]])
    logps = TokenLogps(chosen, rejected, *masks, ref_chosen=chosen * 3, ref_rejected=rejected * 2).pairs()
    found, expected = incentives(LDDPO(beta=0.1, alpha=1.0), logps), incentives(DPO(beta=0.1), logps)
    torch.testing.assert_close(found.chosen, expected.chosen)
    torch.testing.assert_close(found.rejected, expected.rejected)


def test_wrappers_carry_what_their_parts_need(tmp_path: Path) -> None:
    """A sum with a token-weighted part inside gets its tokens."""
    trainer = two_models(tmp_path, WithSFT(WPO(), alpha=0.5))
    batch = runs.collated(trainer, range(4))
    expected = trainer.loss.per_pair(independent(batch)).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected, rtol=2e-5, atol=2e-5)


def test_compute_metrics_gets_logits(tmp_path: Path) -> None:
    """Asked for outputs, `compute_loss` gives the model's plain outputs besides the loss."""
    trainer = two_models(tmp_path, DPOP())
    batch = runs.collated(trainer, range(2))
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


def test_empty_response_counts_as_length_one(tmp_path: Path) -> None:
    """A response without a scored token has log-prob 0 and mean 0, not NaN: such a row can't spoil a run."""
    trainer = two_models(tmp_path, SimPO())
    batch = runs.collated(trainer, range(2))
    batch["completion_mask"][0] = 0
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


def test_model_card_names_the_loss(tmp_path: Path) -> None:
    """The card says what trained the model; with DPO it's TRL's own card."""
    cards = []
    for loss in (SimPO(beta=2.5), DPO()):
        runs.trainer(tmp_path, loss=loss).create_model_card(model_name="tiny")
        cards.append((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert "trained with the loss simpo(beta=2.5)." in cards[0]
    assert "trained with DPO, a method introduced in" in cards[1]
