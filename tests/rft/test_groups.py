"""Groups of answers under a step: laws, limits, and what is predicted against enumeration and TRL's own loss."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.analysis.groups import AnswerMoves, Block, Sides, enough_negatives, mean_geometry
from entangle.analysis.regimes import Regime
from entangle.analysis.sets import drift
from entangle.measure.group_verification import group_loss
from entangle.rewards.gradients import grpo_weights, rloo_weights
from entangle.rewards.groups import Groups, Means, answer_frame, correct_reward, group_frame, move_frame
from entangle.rewards.statistics import Support
from entangle.rewards.steps import LOSS_TYPES, Batch, Group, GroupStep
from tests.tiny import gpt2_tokenizer, llama

DRAW = np.random.default_rng(0)


def scores(count: int, *, common: float = 1.0, size: int = 30, seed: int = 0) -> np.ndarray:
    """Scores with a part that all share."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, size)) + common * draw.normal(size=size)


def group(rewards: Any, lengths: Any = None, finished: Any = None) -> Group:
    rewards = np.asarray(rewards, dtype=np.float64)
    count = len(rewards)
    return Group(
        rewards,
        np.ones(count) if lengths is None else np.asarray(lengths, dtype=np.float64),
        np.ones(count, dtype=bool) if finished is None else np.asarray(finished),
    )


def alone(step: GroupStep, answers: Group, longest: int = 9) -> np.ndarray:
    return step.weights(answers, step.batch_of([answers], longest))


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct", range(1, 8))
def test_standardised_binary_advantages_are_a_step_on_mean_scores(correct):
    """Sum A_j S_j = G sqrt(p(1-p)) (S+ - S-), with TRL's std (ddof 1, + 1e-4): rho = 1 for every p."""
    size, S = 8, scores(8)
    rewards = np.array([1.0] * correct + [0.0] * (size - correct))
    answers, p = group(rewards), correct / size
    step = GroupStep("grpo")
    total = step.advantages(answers, step.batch_of([answers], 9)) @ S
    std = math.sqrt(size / (size - 1) * p * (1 - p))
    expected = size * p * (1 - p) / (std + 1e-4) * (S[:correct].mean(0) - S[correct:].mean(0))
    np.testing.assert_allclose(total, expected, rtol=1e-12)


def test_weights_are_those_of_the_gradient_estimates():
    """With one token each, grpo and rloo are the estimates that the spread of rewards is judged by."""
    rewards = DRAW.normal(size=6)
    np.testing.assert_allclose(alone(GroupStep("grpo"), group(rewards)), grpo_weights(rewards), rtol=1e-12)
    np.testing.assert_allclose(alone(GroupStep("rloo"), group(rewards)), rloo_weights(rewards), rtol=1e-12)


def test_length_weights():
    answers = group([1, 0, 0, 1], [2, 4, 6, 8])
    advantages = GroupStep(scale_rewards="none").advantages(answers, Batch(1, 1, 1))
    found = {
        t: alone(GroupStep(t, "none"), answers, longest=10) / advantages for t in LOSS_TYPES if t != "rloo"
    }
    np.testing.assert_allclose(found["grpo"], 1 / (4 * answers.lengths))
    np.testing.assert_allclose(found["dapo"], [1 / 20] * 4)
    np.testing.assert_allclose(found["bnpo"], found["dapo"])
    np.testing.assert_allclose(found["dr_grpo"], [1 / 40] * 4)


def test_a_batch_of_groups_is_their_mean():
    """Dapo counts the tokens of all groups: weights / B are advantages over all tokens."""
    groups = [group([1, 0], [2, 3]), group([1, 0, 0], [4, 5, 6], [True, True, False])]
    for masked, tokens in ((False, 20), (True, 14)):
        step = GroupStep("dapo", "none", mask_truncated=masked)
        batch = step.batch_of(groups, 9)
        np.testing.assert_allclose(step.weights(groups[0], batch) / 2, [0.5 / tokens, -0.5 / tokens])
    assert step.weights(groups[1], batch)[2] == 0
    rewards = np.array([1, 0, 1, 0, 0.0])
    assert batch.reward_std == pytest.approx(rewards.std(ddof=1))


def test_masked_answers_count_for_the_baseline_alone():
    answers = group([1, 0, 0, 0], [3, 3, 3, 3], [True, True, True, False])
    plain, masked = (alone(GroupStep(mask_truncated=m), answers) for m in (False, True))
    np.testing.assert_allclose(masked, np.where(answers.finished, plain, 0.0))


def test_negatives_can_be_damped_or_left_out():
    answers = group([1, 0.2, 0.1, 0])
    plain = alone(GroupStep(), answers)
    for weight in (0.0, 0.3):
        damped = alone(GroupStep(negative_weight=weight), answers)
        np.testing.assert_allclose(damped, np.where(plain < 0, weight * plain, plain))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_those_of_trls_own_loss(loss_type, scale, masked):
    """The gradient of TRL's loss in each token's log-prob is -w_j on scored tokens, and so is ours."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    rloo = pytest.importorskip("trl.trainer.rloo_trainer")
    lengths, width = [3, 5, 2, 4], 6
    answers = group([1.0, 0.0, 0.5, 0.0], lengths, [True, False, True, True])
    step = GroupStep(loss_type, scale, mask_truncated=masked)
    batch = step.batch_of([answers], width)
    logps = torch.from_numpy(DRAW.normal(size=(4, width)) - 2).requires_grad_()
    scored = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    mask = (scored & torch.from_numpy(answers.finished)[:, None] if masked else scored).long()
    stand_in = trl_trainer(logps, loss_type, width)
    inputs = {
        "prompt_ids": torch.ones(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.ones(4, width, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.from_numpy(step.advantages(answers, batch)),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": logps.detach(),
        "old_logps": (logps.detach() * mask).sum(1),
    }
    trainer = rloo.RLOOTrainer if loss_type == "rloo" else grpo.GRPOTrainer
    loss = trainer._compute_loss(stand_in, stand_in.model, inputs)
    (theirs,) = torch.autograd.grad(loss, logps)
    expected = torch.from_numpy(step.weights(answers, batch))[:, None] * scored
    torch.testing.assert_close(-theirs, expected, rtol=1e-9, atol=1e-12)
    (ours,) = torch.autograd.grad(group_loss(logps * scored, scored, answers, step, batch), logps)
    torch.testing.assert_close(-ours, expected, rtol=1e-9, atol=1e-12)


def trl_trainer(logps: torch.Tensor, loss_type: str, longest: int) -> Any:
    """What `_compute_loss` reads of a trainer; the log-probs are given."""
    nothing = {"train": defaultdict(list), "eval": defaultdict(list)}
    same = SimpleNamespace(gather=lambda x: x, num_processes=1, reduce=lambda x, reduction: x)
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
        accelerator=same,
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        loss_type=loss_type,
        beta=0.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=longest,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=nothing,
        tools=None,
    )


# --- moves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_parts_add_up_to_the_whole_change(loss_type):
    rewards, S = DRAW.normal(size=7), scores(7)
    weights, sides = alone(GroupStep(loss_type), group(rewards, range(1, 8))), Sides.of(rewards)
    moves = AnswerMoves.of(S @ S.T, weights, sides)
    np.testing.assert_allclose(moves.change, S @ S.T @ weights, rtol=1e-10)
    means = moves.means(sides)
    assert means["change_correct"] == pytest.approx(moves.change[sides.correct].mean())
    parts = sum(means[f"correct_{part}"] for part in ("own", "by_correct", "by_incorrect"))
    assert parts == pytest.approx(means["change_correct"])


@pytest.mark.parametrize("seed", range(6))
def test_correct_answers_fall_where_the_block_says_so(seed):
    """Equal weights: the mean change is c (K++ - K+-), c (K+- - K--); damping at K++/K+- stops the fall, not before."""
    rewards = np.array([1.0] * 2 + [0.0] * 6)
    S = scores(8, common=2.0, seed=seed)
    S[:2] *= 0.7  # short scores of correct answers are dragged along
    gram, sides = S @ S.T, Sides.of(rewards)
    block = Block.of(gram, sides, itself=True)
    means = AnswerMoves.of(gram, alone(GroupStep("rloo"), group(rewards)), sides).means(sides)
    size = rewards.std() ** 2 * 8 / 7
    assert means["change_correct"] == pytest.approx(size * (block.sq_correct - block.inner), rel=1e-9)
    assert means["change_incorrect"] == pytest.approx(size * (block.inner - block.sq_incorrect), rel=1e-9)
    assert (means["change_correct"] < 0) == (block.inner > block.sq_correct)
    enough = enough_negatives(means)
    assert enough == pytest.approx(block.enough)
    for weight in (0.9 * enough, 1.1 * enough):
        damped = GroupStep("rloo", negative_weight=weight)
        moved = AnswerMoves.of(gram, alone(damped, group(rewards)), sides).means(sides)["change_correct"]
        assert (moved >= 0) == (weight <= enough)


def test_the_band_is_the_pairs():
    rewards, S = np.array([1.0, 1, 0, 0, 0]), scores(5)
    block = Block.of(S @ S.T, Sides.of(rewards), itself=True)
    low, high = block.band
    plus, minus = S[:2].mean(0), S[2:].mean(0)
    assert block.cosine == pytest.approx(plus @ minus / np.linalg.norm(plus) / np.linalg.norm(minus))
    for rho in (0.9 * low, 1.1 * low, 0.9 * high, 1.1 * high):
        step = rho * plus - minus
        assert (plus @ step > 0 > minus @ step) == (low < rho < high)


def test_limits():
    """All correct: nothing moves and nothing is said of the other side; one answer a side; answers that are one."""
    S = scores(4)
    gram = S @ S.T
    solved = group([1.0] * 4)
    sides = Sides.of(solved.rewards, high=1.0)
    assert not alone(GroupStep(), solved).any() and sides.counts == (4, 0) and not sides.is_mixed
    assert Sides.of(solved.rewards).counts == (0, 0)
    block = Block.of(gram, sides)
    assert block.sq_correct > 0 and math.isnan(block.inner) and math.isnan(block.enough)
    two = Sides.of(np.array([1.0, 0.0]))
    assert math.isnan(Block.of(gram[:2, :2], two).sq_correct)
    moves = AnswerMoves.of(gram[:2, :2], alone(GroupStep("rloo"), group([1, 0])), two)
    assert all(map(math.isnan, moves.further(two)))
    np.testing.assert_allclose(moves.change, 0.5 * gram[:2, :2] @ [1, -1])
    same = np.ones((4, 1)) @ S[:1]
    rewards = np.array([1.0, 0, 0, 1])
    means = AnswerMoves.of(same @ same.T, alone(GroupStep("rloo"), group(rewards)), Sides.of(rewards)).means(
        Sides.of(rewards)
    )
    assert means["change_correct"] == pytest.approx(0, abs=1e-12)
    assert Block.of(same @ same.T, Sides.of(rewards)).cosine == pytest.approx(1)


def test_answers_at_the_mean_are_on_no_side():
    sides = Sides.of(np.array([0.0, 0.5, 1.0, 0.5]))
    assert sides.counts == (1, 1) and not (sides.correct | sides.incorrect)[1]


# --- without bias, by enumeration ---------------------------------------------------------------------------


def test_block_and_further_changes_are_unbiased():
    """All groups of 4 that a policy with 5 answers can give, each with its probability.

    Given n correct answers in a group they are independent draws among the correct ones, so the mean over groups of K++
    is |E S+|^2, and a further correct answer moves by what the group's step does to a fresh one.
    """
    size, S = 4, scores(5, size=3)
    chances, rewards = np.array([0.3, 0.1, 0.2, 0.15, 0.25]), np.array([1.0, 1, 0, 0, 0])
    plus = chances[:2] @ S[:2] / chances[:2].sum()
    minus = chances[2:] @ S[2:] / chances[2:].sum()
    lengths = np.array([1.0, 3, 2, 5, 4])
    step, total = GroupStep("grpo"), 0.0
    found, expected = np.zeros(5), np.array([plus @ plus, plus @ minus, minus @ minus, 0.0, 0.0])
    for drawn in itertools.product(range(5), repeat=size):
        own = list(drawn)
        sides = Sides.of(rewards[own])
        if sides.counts != (2, 2):
            continue
        gram, chance = S[own] @ S[own].T, chances[own].prod()
        block = Block.of(gram, sides)
        weights = alone(step, group(rewards[own], lengths[own]))
        moves = AnswerMoves.of(gram, weights, sides)
        found += chance * np.array([block.sq_correct, block.inner, block.sq_incorrect, *moves.further(sides)])
        expected[3:] += chance * np.array([plus @ S[own].T @ weights, minus @ S[own].T @ weights])
        total += chance
    np.testing.assert_allclose(found[:3] / total, expected[:3], rtol=1e-12)
    np.testing.assert_allclose(found[3:], expected[3:], rtol=1e-10)


# --- many prompts -------------------------------------------------------------------------------------------


def rows_of(rewards: list[list[float]], *, common: float = 1.0) -> pd.DataFrame:
    rows = []
    for i, own in enumerate(rewards):
        S = scores(len(own), seed=i, common=common)
        rows.append(
            {
                "index": i,
                "prompt_hash": f"prompt {i}",
                "rewards": np.array(own, dtype=float),
                "lengths": np.arange(1, len(own) + 1),
                "finished": [True] * len(own),
                "gram": (S @ S.T).ravel(),
            }
        )
    return pd.DataFrame(rows)


def groups_of(rows: pd.DataFrame, *types: Any) -> Groups:
    return Groups.of(rows, {name: GroupStep(name) for name in types}, Support(), 9, 1e-10)


def test_tables_of_a_run():
    rows = rows_of([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    groups = groups_of(rows, "grpo", "rloo")
    frame, moves, answers = group_frame(groups), move_frame(groups), answer_frame(groups)
    assert frame["correct"].tolist() == [2, 4, 0, 1] and frame["incorrect"].tolist() == [2, 0, 4, 3]
    assert moves["index"].tolist() == [0, 0, 3, 3] and moves["step"].tolist() == ["grpo", "rloo"] * 2
    assert len(answers) == 2 * 2 * 4
    own = answers[(answers["index"] == 0) & (answers["step"] == "rloo")]
    np.testing.assert_allclose(own["weight"], own["advantage"] / 4)
    correct = own[own["side"] == "correct"]["change"].mean()
    row = moves[(moves["index"] == 0) & (moves["step"] == "rloo")].iloc[0]
    assert row["change_correct"] == pytest.approx(correct)
    assert row["displaced"] == (correct < 0)
    assert (
        frame.loc[3, "sq_correct"] != frame.loc[3, "sq_correct"]
    )  # one correct answer: no two different ones


def test_rewards_of_two_values_are_binary():
    assert correct_reward([np.array([-1.0, 2]), np.array([2.0])], Support()) == 2
    assert correct_reward([np.array([0.0, 1, 2])], Support()) is None
    assert correct_reward([np.array([0.0])], Support(0, 1, is_binary=True)) == 1


def test_means_over_prompts_and_their_drift():
    """The set's geometry of the means, and its drift by hand for equal weights."""
    rows = rows_of([[1, 0, 0, 1, 1, 0]] * 12, common=0.5)
    groups = groups_of(rows, "rloo", "dapo")
    frame, moves = group_frame(groups), move_frame(groups)
    means = Means.of(groups, frame, moves)
    assert means.own is not None and means.further is not None
    for geometry, suffix, change in ((means.own, "_sample", "change"), (means.further, "", "further")):
        block = frame[[f"{n}{suffix}" for n in ("sq_correct", "inner", "sq_incorrect")]].mean().to_numpy()
        np.testing.assert_allclose(geometry.products[[0, 0, 1], [0, 1, 1]], block)
        for number, step in enumerate(("rloo", "dapo")):
            own, move = moves[moves["step"] == step], geometry.move_along(2 + number)
            assert move.chosen.value == pytest.approx(own[f"{change}_correct"].mean())
            assert move.rejected.value == pytest.approx(own[f"{change}_incorrect"].mean())
            one = torch.tensor(1.0, dtype=torch.float64)
            if move.margin.value > 0:
                assert move.drift.value == pytest.approx(float(drift(one, one, torch.tensor(block))))


def test_intervals_of_means_are_those_of_groups_of_prompts():
    """With as many groups as prompts, the jackknife of a mean is its standard error."""
    prompts, changes = [f"p{i}" for i in range(9)], DRAW.normal(size=(9, 1, 2))
    geometry = mean_geometry(prompts, DRAW.normal(size=(9, 3)), changes)
    move = geometry.move_along(2)
    half = 2.306 * changes[:, 0, 0].std(ddof=1) / 3
    assert move.chosen.value == pytest.approx(changes[:, 0, 0].mean())
    assert move.chosen.high - move.chosen.value == pytest.approx(half, rel=1e-3)
    assert move.regime in Regime


@pytest.mark.parametrize("scale", ["group", "batch", "none", "rloo"])
def test_advantages_are_those_of_trls_own_trainer(scale, tmp_path):
    """A trainer's step on two prompts: its advantages from the rewards that it was given, one group of which ties."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rewards = [1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0]
    is_rloo = scale == "rloo"
    kind, config = (trl.RLOOTrainer, trl.RLOOConfig) if is_rloo else (trl.GRPOTrainer, trl.GRPOConfig)
    options: dict[str, Any] = {"normalize_advantages": False} if is_rloo else {"scale_rewards": scale}
    trainer = kind(
        model=llama(),
        reward_funcs=lambda prompts, completions, **columns: rewards,
        processing_class=gpt2_tokenizer(pad=True),
        train_dataset=Dataset.from_list([{"prompt": "the cat"}, {"prompt": "she said"}]),
        args=config(
            output_dir=str(tmp_path),
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=4,
            max_steps=1,
            beta=0.0,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **options,
        ),
    )
    trainer.train()
    theirs = np.array(trainer._logs["advantages"])
    groups = [group(rewards[:4]), group(rewards[4:])]
    step = GroupStep("rloo") if is_rloo else GroupStep("grpo", scale)
    ours = np.concatenate([step.advantages(own, step.batch_of(groups, 4)) for own in groups])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
