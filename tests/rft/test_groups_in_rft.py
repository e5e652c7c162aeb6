"""Groups of answers in a run of `entangle rft`: against autograd, all products of scores, and real steps."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.analysis.group_verdict import group_verdict
from entangle.commands.rft import RftResult, command, run_rft
from entangle.config import ModelOptions, RftConfig
from entangle.errors import ConfigError
from entangle.measure import group_verification
from entangle.measure.group_verification import group_loss
from entangle.measure.prompts import ANSWERS
from entangle.models import load_policy
from entangle.rewards.groups import PromptGroup
from entangle.rewards.recorded import load_rollouts
from entangle.rewards.rollouts import Rollout
from entangle.rewards.steps import GroupStep
from entangle.scores import AutogradEngine, token_logps
from entangle.scores.gram import score_gram
from entangle.scores.tokens import token_matrix
from tests.rft.breaking import broken_at
from tests.tiny import save_adapter, save_policy

TYPES = ("grpo", "dapo", "dr_grpo", "rloo")
ANSWER_TEXTS = (" the sum is four", " four", " the other cats sat there", " dogs", " they think the mat")
REWARDS = (
    [1, 1, 0, 0, 0],
    [0, 1, 0, 1, 0],
    [1, 1, 1, 1, 1],
    [0, 1, 1, 0, 1],
    [0, 0, 0, 0, 0],
    [1, 0, 1, 0, 0],
)
PROMPTS = (
    "what is the sum?",
    "TL;DR:",
    "she said that",
    "the cat",
    "they think",
    "the other cat sat there too",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A policy with an adapter, and answers to six prompts, two of which tie."""
    path = tmp_path_factory.mktemp("groups")
    save_policy(path / "policy")
    save_adapter(path / "adapter", str(path / "policy"))
    rows = [
        {"prompt": prompt, "completions": [f"{text} {i}" for text in ANSWER_TEXTS], "rewards": rewards}
        for i, (prompt, rewards) in enumerate(zip(PROMPTS, REWARDS, strict=True))
    ]
    (path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder, out, **changes) -> RftConfig:
    given = dict(
        model_name_or_path=str(folder / "policy"),
        adapter_name_or_path=str(folder / "adapter"),
        dtype="float64",
        rollouts=str(folder / "rollouts.jsonl"),
        shard_size=2,
        loss_types=TYPES,
        output_dir=str(out),
        plots=False,
    )
    return RftConfig(**(given | changes))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> RftResult:
    return run_rft(options(folder, tmp_path_factory.mktemp("runs") / "run", verify=3))


@cache
def policy_of(folder):
    return load_policy(
        ModelOptions(str(folder / "policy"), adapter_name_or_path=str(folder / "adapter"), dtype="float64")
    )


def rollouts_of(folder) -> list[Rollout]:
    return load_rollouts(str(folder / "rollouts.jsonl"), policy_of(folder).tokenizer)


@pytest.mark.parametrize("step", TYPES)
def test_changes_are_those_of_the_gradient_of_the_loss(folder, finished, step):
    """Every answer's predicted change = <its score, -gradient of the loss on tokens>, by autograd alone."""
    policy, answers = policy_of(folder), finished.run.table("answer_moves.parquet")
    rows = finished.run.read_shards(ANSWERS)
    groups = [PromptGroup.of(row, 1.0) for row in rows.to_dict("records")]
    how = GroupStep(step)
    batch = how.batch_of([g.group for g in groups], max(int(g.group.lengths.max()) for g in groups))
    for index, rollout in list(enumerate(rollouts_of(folder)))[:2]:
        found = answers[(answers["index"] == index) & (answers["step"] == step)]["change"].to_numpy()
        collated = rollout.collate(policy.pad_id)
        loss = group_loss(
            token_logps(policy.model, collated), collated.scored, groups[index].group, how, batch
        )
        if step == "dapo":  # alone the group's own tokens are counted, in a batch those of the mean group
            loss = loss * groups[index].group.lengths.sum() / batch.tokens
        grads = torch.autograd.grad(loss, list(policy.parameters.values()))
        direction = {name: -g for name, g in zip(policy.parameters, grads, strict=True)}
        expected = AutogradEngine(policy.model, policy.parameters).products(collated, direction)
        # the model's norms round to float32, whatever they are given: about 1e-7 of the terms, which cancel in part
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_across_prompts_is_the_mean_over_different_prompts(folder, finished):
    """The block and every step's effect on others, from the Gram matrix of all answers of all prompts."""
    policy, rows = policy_of(folder), finished.run.read_shards(ANSWERS)
    batches = [rollout.collate(policy.pad_id) for rollout in rollouts_of(folder)]
    gram = score_gram(AutogradEngine(policy.model, policy.parameters), batches).numpy().reshape(6, 5, 6, 5)
    groups = [PromptGroup.of(row, 1.0) for row in rows.to_dict("records")]
    mixed = [i for i, g in enumerate(groups) if g.sides.is_mixed]
    pairs = [(i, j) for i in mixed for j in mixed if i != j]
    others = finished.summary["groups"]["others"]

    def mean(left, right):
        return np.mean([left(i) @ gram[i, :, j] @ right(j) for i, j in pairs])

    def side(number):
        return lambda i: groups[i].sides.both[number] / groups[i].sides.counts[number]

    assert others["prompts"] == len(mixed) == 4
    for name, sides in {"sq_correct": (0, 0), "inner": (0, 1), "sq_incorrect": (1, 1)}.items():
        assert others[name]["value"] == pytest.approx(mean(*map(side, sides)), rel=1e-5), name
    longest = max(int(g.group.lengths.max()) for g in groups)
    for step in TYPES:
        how = GroupStep(step)
        batch = how.batch_of([g.group for g in groups], longest)
        weights = [how.weights(g.group, batch) for g in groups]
        for number, name in enumerate(("correct", "incorrect")):
            expected = mean(side(number), lambda j, weights=weights: weights[j])
            assert others["moves"][step][name]["value"] == pytest.approx(expected, rel=1e-5), (step, name)


def test_real_steps_agree(finished):
    """In float64 all signs agree and halving a step divides the error by four."""
    checked = finished.summary["groups"]["verification"]
    assert checked["all"]["steps"] == 3 * len(TYPES) and checked["all"]["prompts"] == 3
    assert set(checked) == {*TYPES, "all"}
    for found in checked.values():
        assert found["signs_agree"] == found["signs_compared"] > 0
        assert found["slope"] == pytest.approx(1, abs=0.05)
        assert found["error_ratio"] == pytest.approx(4, abs=0.4)


def test_verification_can_fail(folder, tmp_path, monkeypatch):
    """Weights of another loss than the one stepped on: the error doesn't fall as it should, signs differ."""
    wrong = dataclasses.replace(GroupStep(), negative_weight=-1.0)
    real = group_verification.group_loss
    monkeypatch.setattr(
        group_verification,
        "group_loss",
        lambda tokens, scored, group, step, batch: real(tokens, scored, group, wrong, batch),
    )
    result = run_rft(options(folder, tmp_path / "run", verify=3, loss_types=("grpo",)))
    found = result.summary["groups"]["verification"]["all"]
    assert found["error_ratio"] < 3 and found["signs_agree"] < found["signs_compared"]
    said = " ".join(result.table().split())
    assert "signs of the answers' changes agree" in said and "VERIFICATION FAILED under grpo" in said
    assert command(options(folder, tmp_path / "run", verify=3, loss_types=("grpo",))).status == 1


def test_a_broken_run_resumes_to_the_same_sums(folder, finished, tmp_path):
    config = options(folder, tmp_path / "run", verify=3)
    with broken_at(3):
        run_rft(config)
    again = run_rft(config)
    assert again.summary["groups"] == finished.summary["groups"]
    for name in ("groups.parquet", "group_moves.parquet", "answer_moves.parquet", "steps.parquet"):
        pd.testing.assert_frame_equal(again.run.table(name), finished.run.table(name))
    assert sorted(f.name for f in again.run.path.iterdir() if f.is_dir()) == ["answers"]


def test_without_across_and_with_damping(folder, finished, tmp_path):
    """No sums are kept; positive answers alone never lower their own mean; cut answers can be masked."""
    config = options(
        folder,
        tmp_path / "run",
        across=False,
        negative_weight=0.0,
        loss_types=("rloo",),
        max_length=12,
        mask_truncated_completions=True,
    )
    result = run_rft(config)
    groups = result.summary["groups"]
    assert groups["others"] is None and groups["parts"]["rloo"]["correct"]["by_incorrect"] == 0
    answers = result.run.table("answer_moves.parquet")
    cut = ~np.concatenate(result.run.read_shards(ANSWERS)["finished"].tolist()).astype(bool)
    assert cut.any()
    mixed = np.repeat(np.isin(np.arange(6), answers["index"].unique()), 5)
    assert (answers["weight"].to_numpy()[cut[mixed]] == 0).all()
    assert (answers["weight"] >= 0).all()


def test_rewards_that_all_tie_give_no_step_and_say_so(folder, tmp_path):
    result = run_rft(options(folder, tmp_path / "run", reward="length:least=0,most=99", verify=2, limit=2))
    groups = result.summary["groups"]
    assert groups["prompts"] == {"total": 2, "mixed": 0, "all_correct": 2, "all_incorrect": 0, "tied": 0}
    assert groups["own"] is None and groups["others"] is None and groups["verification"]["all"]["steps"] == 0
    words = " ".join(result.table().split())
    assert "No prompt of 2 has both correct and incorrect answers" in words
    assert "No step could be taken for real" in words
    assert any("isn't measured" in note for note in result.run.read_json("provenance.json")["notes"])


def test_terminal_says_the_finding_first(finished):
    text = finished.table(width=120)
    said = group_verdict(finished.summary["groups"])
    words = " ".join(text.split())
    assert words.index(said[0]) < words.index("Share of prompts, %")
    for sentence in said:
        assert sentence in words
    for part in ("displaced", "by the other incorrect", "real steps on 3 prompts"):
        assert part in words, part


def test_tokens_of_incorrect_answers_add_up(folder, finished, tmp_path):
    """Every token's product against all products of tokens; an answer's add up to its product with the mean score."""
    result = run_rft(options(folder, tmp_path / "run", tokens=2, across=False))
    found, policy = result.run.table("tokens.parquet"), policy_of(folder)
    moves = finished.run.table("group_moves.parquet")
    first = moves[moves["step"] == "grpo"].sort_values("correct_by_incorrect")
    assert found["index"].unique().tolist() == first["index"].tolist()[:2]
    rows = finished.run.read_shards(ANSWERS).set_index("index", drop=False)
    for index, own in found.groupby("index"):
        prompt = PromptGroup.of(rows.loc[index].to_dict(), 1.0)
        sums = own.groupby("answer")["product"].sum()
        expected = prompt.gram[:, prompt.sides.correct].mean(1)[prompt.sides.incorrect]
        np.testing.assert_allclose(sums, expected, atol=1e-6 * abs(expected).max())
    index = int(found["index"].iloc[0])
    rollout = next(r for r in rollouts_of(folder) if r.prompt.index == index)
    lengths = [len(ids) for ids in rollout.answer_ids]
    matrix = token_matrix(policy.model, policy.parameters, rollout.collate(policy.pad_id)).numpy()
    owner = np.repeat(np.arange(len(lengths)), lengths)
    sides = PromptGroup.of(rows.loc[index].to_dict(), 1.0).sides
    expected = matrix[:, sides.correct[owner]].sum(1)[sides.incorrect[owner]] / sides.correct.sum()
    products = found[found["index"] == index]["product"]
    np.testing.assert_allclose(products, expected, atol=1e-6 * abs(expected).max())
    text = " ".join(result.table(width=120).split())
    assert "Tokens of incorrect answers that cost the correct ones most" in text
    assert result.summary["groups"]["tokens"][0]["product"] == found["product"].max()


def test_options_that_make_no_sense():
    for changes, message in (
        ({"loss_types": ()}, "At least one loss type"),
        ({"negative_weight": -1.0}, "negative_weight must be at least 0"),
        ({"loss_types": ("ppo",)}, "one of grpo, dapo"),
        ({"verify": -1}, "verify must be at least 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            RftConfig(**changes)
