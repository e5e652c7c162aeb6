"""Mitigations in TRL's trainer: a real step is the step that the law says, and what makes no sense is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entangle.analysis.mitigations import (
    Mitigation,
    PairwiseNormalised,
    RewardCalibration,
    Select,
    Sequential,
    TokenMasking,
    VirtualSplitting,
    kept_tokens,
)
from entangle.scores import Engine, make_engine
from entangle.scores.tokens import token_products
from entangle.training import TrainingError
from entangle.training.mitigated import MitigatedTrainer, check_mitigations, masked_tokens, row_batch
from losses import DPO, PairLogps, PreferenceLoss, build
from tests.training import runs

RATE = 1.0  # a step is linear in it, and a large one has its digits in float32 weights
SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": RATE,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 3,
}


def trainer(folder: Path, mitigation: Mitigation, loss: PreferenceLoss | None = None, **args: Any) -> Any:
    """A mitigated trainer of the tiny policy, all of its weights trained."""
    reference = runs.policy() if (loss or DPO()).needs_reference else None
    return runs.trainer(
        folder,
        MitigatedTrainer,
        mitigation=mitigation,
        loss=loss or DPO(),
        ref_model=reference,
        peft_config=None,
        train_dataset=runs.pairs(6),
        args={"max_steps": 1} | args,
    )


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def step_of(done: Any) -> Tensor:
    """What one training step did to the weights."""
    before = weights(done.model)
    done.train()
    return weights(done.model) - before


def slow_engine(model: Any) -> Engine:
    return make_engine(model, dict(model.named_parameters()), "autograd")


def scores(batch: Any) -> tuple[Tensor, Tensor]:
    """(g_w, g_l) of a batch under the initial policy, `(B, P)` each, by the slow engine."""
    model = runs.policy()
    found = slow_engine(model).scores(batch)
    return torch.cat([found[name] for name, _ in model.named_parameters()], 1).double().chunk(2)


def expected_step(batch: Any, factors: Any, loss: PreferenceLoss) -> Tensor:
    """lr/B sum of a_w d_w g_w - a_l d_l g_l, policy = reference."""
    g_w, g_l = scores(batch)
    logps = slow_engine(runs.policy()).pairs(batch).logps
    lengths = batch.lengths
    pairs = PairLogps(*logps.chunk(2), *lengths.chunk(2), *(logps.chunk(2) if loss.needs_reference else ()))
    d = loss.incentives(pairs)
    a_w, a_l = factors(d, g_w.norm(dim=1), g_l.norm(dim=1))
    return RATE / len(g_w) * ((a_w * d.chosen) @ g_w - (a_l * d.rejected) @ g_l)


CALIBRATED = [
    ("pairwise_normalised", PairwiseNormalised(), lambda d, chosen, rejected: (1 / chosen, 1 / rejected)),
    (
        "reward_calibration",
        RewardCalibration(),
        lambda d, chosen, rejected: (
            (rejected / chosen * d.rejected / d.chosen).sqrt(),
            (chosen / rejected * d.chosen / d.rejected).sqrt(),
        ),
    ),
]


@pytest.mark.parametrize(
    "loss", [DPO(), build({"name": "cpo", "nll_weight": 0.5})], ids=lambda loss: loss.name
)
@pytest.mark.parametrize(("name", "mitigation", "factors"), CALIBRATED, ids=[row[0] for row in CALIBRATED])
def test_a_real_step_rescales_each_pairs_incentives(
    name: str, mitigation: Mitigation, factors: Any, loss: PreferenceLoss, tmp_path: Path
) -> None:
    """The weights move by the law's step; the loss and TRL's metrics are those of an unmitigated step."""
    done = trainer(tmp_path, mitigation, loss, **SGD)
    batch = row_batch(next(iter(trainer(tmp_path, mitigation, loss, **SGD).get_train_dataloader())))
    step = step_of(done).double()
    expected = expected_step(batch, factors, loss)
    assert float((step - expected).norm() / expected.norm()) < 2e-3  # the step is taken in float32
    plain = runs.trainer(
        tmp_path,
        loss=loss,
        ref_model=runs.policy() if loss.needs_reference else None,
        peft_config=None,
        train_dataset=runs.pairs(6),
        args={"max_steps": 1} | SGD,
    )
    other = step_of(plain).double()
    assert float((other - expected).norm() / expected.norm()) > 0.1
    for key in ("loss", "logps/chosen", "entangle/incentive_rejected"):
        assert runs.logged(done, key) == pytest.approx(runs.logged(plain, key), rel=1e-5)


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Two micro-batches of 3 pairs make the step of one batch of 6: factors are a pair's own."""
    steps = [
        step_of(trainer(tmp_path, RewardCalibration(), **(SGD | options)))
        for options in (
            {"per_device_train_batch_size": 6},
            {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        )
    ]
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-5)


def test_moving_average_is_kept_in_checkpoints(tmp_path: Path) -> None:
    """A run that is resumed in the middle ends with the weights of an unbroken one."""
    options = SGD | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    rule = RewardCalibration(norms="ema")
    whole = trainer(tmp_path, rule, **options)
    whole.train()
    resumed = trainer(tmp_path, rule, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    kept = whole.state.stateful_callbacks["reward_calibration"]["log_ratio"]
    assert kept != 0 and resumed.state.stateful_callbacks["reward_calibration"]["log_ratio"] == kept


def test_masks_end_with_pairs_that_are_not_entangled(tmp_path: Path) -> None:
    """For every pair: all tokens stay if c < min(A, B); else what is left has c < min(A, B), or the most is dropped."""
    model = runs.policy()
    rows = [
        row | {"rejected": row["chosen"] + row["rejected"]} for row in runs.pairs(6)
    ]  # share what they begin with
    made = runs.trainer(tmp_path, train_dataset=runs.Dataset.from_list(rows))
    batch = row_batch(runs.collated(made, range(6)))
    engine, rule = slow_engine(model), TokenMasking(max_share=0.8, rounds=8)
    before = engine.pairs(batch).geometry
    entangled = torch.minimum(before.gap_chosen, before.gap_rejected) <= 0
    assert 0 < int(entangled.sum()) < 6
    kept = masked_tokens(engine, batch, rule)
    scored = batch.scored
    assert not bool((kept & ~scored).any())
    for i in range(6):
        rows = torch.tensor([i, i + 6])
        if not entangled[i]:
            assert torch.equal(kept[rows], scored[rows])
            continue
        assert int(kept[rows].sum()) < int(scored[rows].sum())
        assert bool(kept[rows].any(1).all())
    mask = batch.completion_mask.clone()
    mask[:, 1:] *= kept
    masked = type(batch)(batch.input_ids, batch.attention_mask, mask, batch.prompt_length)
    after = engine.pairs(masked).geometry
    freed = entangled & (torch.minimum(after.gap_chosen, after.gap_rejected) > 0)
    assert int(freed.sum()) > 0
    tried = [int(kept[[i, i + 6]].sum()) for i in range(6) if entangled[i] and not freed[i]]
    most = [fewest(engine, batch, i, rule.max_share) for i in range(6) if entangled[i] and not freed[i]]
    assert tried == most  # who isn't freed has been through every round


def fewest(engine: Engine, batch: Any, pair: int, share: float) -> int:
    """Tokens of a pair that are left when as many are dropped as may be."""
    rows = [pair, pair + 6]
    columns = [c[rows] for c in (batch.input_ids, batch.attention_mask, batch.completion_mask)]
    found = token_products(
        engine.model, engine.parameters, type(batch)(*columns, batch.prompt_length[[pair]])
    )
    sides = (found.chosen.along_rejected, found.rejected.along_chosen)
    return sum(int(kept_tokens(side, share).sum()) for side in sides)


def test_masked_step_is_the_step_on_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped tokens keep their part in the loss and give no gradient."""
    import entangle.training.mitigated as module

    def every_second(engine: Engine, batch: Any, rule: TokenMasking) -> Tensor:
        return batch.scored & (torch.arange(batch.scored.shape[1]) % 2 == 0)

    monkeypatch.setattr(module, "masked_tokens", every_second)
    done = trainer(tmp_path, TokenMasking(), **SGD)
    batch = row_batch(next(iter(trainer(tmp_path, TokenMasking(), **SGD).get_train_dataloader())))
    step = step_of(done).double()
    mask = batch.completion_mask.clone()
    mask[:, 1:] *= every_second(None, batch, TokenMasking())
    left = type(batch)(batch.input_ids, batch.attention_mask, mask, batch.prompt_length)
    g_w, g_l = scores(left)
    expected = RATE / len(g_w) * 0.05 * (g_w - g_l).sum(0)  # DPO at its start: d = beta / 2
    assert float((step - expected).norm() / expected.norm()) < 2e-3
    assert runs.logged(done, "loss") == pytest.approx([0.6931], abs=1e-4)
    assert 0 < runs.logged(done, "entangle/dropped_tokens")[0] < 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sequential_step_is_two_steps(accumulation: int, tmp_path: Path) -> None:
    """Theta - h g+(theta), then + h g-(theta1), d = beta / 2 frozen: two plain SGD steps by hand."""
    options = SGD | {"learning_rate": 0.05, "gradient_accumulation_steps": accumulation}
    options["per_device_train_batch_size"] = 6 // accumulation
    done = trainer(tmp_path, Sequential(), **options)
    batch = row_batch(runs.collated(done, range(6)))
    step = step_of(done)
    model = runs.policy()
    start = weights(model)
    for rows, sign in ((slice(0, 6), 1), (slice(6, 12), -1)):
        loss = -sign * 0.05 * logps(model, batch)[rows].mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    by_hand = weights(model) - start
    plain = step_of(trainer(tmp_path, Sequential(order="rejected_first"), **options))
    assert float((step - by_hand).norm() / by_hand.norm()) < 1e-4
    assert float((plain - by_hand).norm() / by_hand.norm()) > 1e-3


def logps(model: Any, batch: Any) -> Tensor:
    columns = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return runs.plain_logps(model, columns | {"completion_mask": batch.completion_mask})[0]


@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_virtual_splitting_at_zero_is_adam_and_else_is_not(max_norm: float, tmp_path: Path) -> None:
    """Also where gradients are clipped: then q_stage is scaled as q is, so a tiny k is nearly Adam too."""
    options = {"max_steps": 3, "optim": "adamw_torch", "max_grad_norm": max_norm, "learning_rate": 1e-2}
    plain = runs.trainer(
        tmp_path, ref_model=runs.policy(), peft_config=None, train_dataset=runs.pairs(6), args=options
    )
    plain.train()
    found = {}
    for k in (0.0, 1e-6, 1e-2):
        done = trainer(tmp_path, VirtualSplitting(k=k), **options)
        done.train()
        found[k] = weights(done.model)
    assert torch.equal(found[0.0], weights(plain.model))
    moved = float((found[0.0] - weights(runs.policy())).norm())
    assert float((found[1e-6] - found[0.0]).norm()) < 1e-3 * moved
    assert 1e-2 * moved < float((found[1e-2] - found[0.0]).norm()) < 0.1 * moved


def test_virtual_splitting_from_a_fresh_lora(tmp_path: Path) -> None:
    """B = 0 leaves A without gradient at the first step, but not without q_stage: A must wait as it does under Adam."""
    args = {"max_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}
    steps = []
    for k in (0.0, 1.0):
        done: Any = runs.trainer(
            tmp_path, MitigatedTrainer, mitigation=VirtualSplitting(k=k), loss=DPO(), args=args
        )
        before = {n: p.detach().clone() for n, p in done.model.named_parameters() if p.requires_grad}
        done.train()
        now = dict(done.model.named_parameters())
        steps.append({n: now[n].detach() - p for n, p in before.items()})
    plain, virtual = steps
    assert all(not part.any() for n, part in virtual.items() if "lora_A" in n)
    assert any(not torch.equal(virtual[n], part) for n, part in plain.items())
    size = [sum(float(part.square().sum()) for part in step.values()) ** 0.5 for step in steps]
    assert 0.5 * size[0] < size[1] < 5 * size[0]


@pytest.mark.parametrize(
    ("mitigations", "loss", "args", "message"),
    [
        ([PairwiseNormalised(), RewardCalibration()], "dpo", {}, "At most one"),
        ([Select(share=0.5), Select(share=0.2)], "dpo", {}, "one select"),
        ([PairwiseNormalised()], "wpo", {}, "one for every token"),
        ([RewardCalibration()], "sft", {}, "no rejected half"),
        ([Sequential()], "dpo", {}, "made for optim sgd"),
        ([VirtualSplitting()], "dpo", {"optim": "sgd"}, "made for optim adamw_torch"),
    ],
)
def test_what_does_not_fit_is_refused(
    mitigations: list[Mitigation], loss: str, args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        check_mitigations(mitigations, build(loss), runs.arguments(tmp_path, **args))


def test_losses_of_every_family_go_with_a_mitigation(tmp_path: Path) -> None:
    """Batch-coupled, pointwise and composed losses train a step with calibrated incentives."""
    for name in ("kto", "bco_pair", "aot", "orpo", "weighted_sum"):
        assert float(step_of(trainer(tmp_path, RewardCalibration(), build(name), **SGD)).abs().sum()) > 0, (
            name
        )


def test_the_only_changing_mitigation_is_found(tmp_path: Path) -> None:
    args = runs.arguments(tmp_path)
    assert check_mitigations([Select(share=0.5)], DPO(), args) is None
    assert check_mitigations([Select(share=0.5), TokenMasking()], DPO(), args) == TokenMasking()
