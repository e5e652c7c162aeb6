"""The command: rows from a model, the same numbers as `probe` and `rft`; resumable; tables and figures."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from entangle import cli
from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.commands.joint import JointResult, run_joint
from entangle.commands.probe import run_probe
from entangle.commands.rft import run_rft
from entangle.config import JointConfig, ModelOptions, ProbeConfig, RftConfig
from entangle.data import DataError, collate, load_pairs, tokenize_pair
from entangle.errors import ConfigError, RunError
from entangle.figures import signals
from entangle.figures.style import new_axes
from entangle.measure.prompts import ANSWERS, PromptMeasurement
from entangle.models import load_policy
from entangle.rewards.functions import build_reward_function
from entangle.rewards.gradients import rloo_weights
from entangle.rewards.rollouts import Prompt, Sampling, prompts_of, sample_answers
from entangle.scores import AutogradEngine, row_logps
from entangle.tables import joint as joint_tables
from entangle.tables.base import render
from tests.rft.breaking import broken_at, recorded
from tests.tiny import ROWS, save_adapter, save_policy

PAIRS = (
    *ROWS,
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " sat on the other mat"},
    {"prompt": "TL;DR:", "chosen": " a second pair of one prompt", "rejected": " dogs"},
    {"prompt": "they think", "chosen": " the same", "rejected": " the same"},
    {"prompt": "the cat sat " * 30, "chosen": " there", "rejected": " there too"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A policy with an adapter; pairs, of which two have one prompt, one is of equal texts, one leaves no room."""
    path = tmp_path_factory.mktemp("joint")
    save_policy(path / "policy")
    save_adapter(path / "adapter", str(path / "policy"))
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def shared_options(folder, out) -> dict:
    return dict(
        model_name_or_path=str(folder / "policy"),
        adapter_name_or_path=str(folder / "adapter"),
        dtype="float64",
        dataset_name=str(folder / "pairs.jsonl"),
        max_length=64,
        output_dir=str(out),
    )


def answer_options(folder, out, **changes) -> dict:
    given = dict(
        reward="length:least=3,most=6",
        num_generations=8,
        batch_size=16,
        max_completion_length=8,
        group_size=3,
        shard_size=2,
        plots=False,
    )
    return shared_options(folder, out) | given | changes


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> JointResult:
    return run_joint(
        JointConfig(**answer_options(folder, tmp_path_factory.mktemp("runs") / "run", plots=True))
    )


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(
        ModelOptions(str(folder / "policy"), adapter_name_or_path=str(folder / "adapter"), dtype="float64")
    )


def test_every_prompt_has_one_row(finished):
    assert finished.prompts["index"].tolist() == [0, 1, 2, 3, 5, 6]  # 4 has the prompt of 1
    assert finished.prompts["dropped"].tolist() == [False] * 5 + [True]
    assert finished.summary["prompts"]["measured"] == 5
    states = finished.prompts.set_index("index")["pair_state"]
    assert states[5] == "degenerate" and states.isna().tolist() == [False] * 5 + [True]
    assert "1 pairs of the data set" in " ".join(finished.run.read_json("provenance.json")["notes"])
    assert not (finished.run.path / "pairs").exists()


def test_pairs_are_as_a_probe_sees_them(folder, finished, tmp_path):
    """Geometry, incentives, changes and regimes against `entangle probe` on the same pairs, by its own engine pass."""
    probe = run_probe(ProbeConfig(**shared_options(folder, tmp_path / "probe"), losses=("dpo",)))
    ours = finished.prompts[finished.prompts["pair_regime"].notna()].set_index("index")
    pairs = probe.pairs.set_index("index").loc[ours.index]
    predictions = probe.predictions.set_index("index").loc[ours.index]
    for name in (*GEOMETRY_COLUMNS, "cosine", "length_chosen", "length_rejected"):
        scale = pairs["sq_chosen"].mean() if name in GEOMETRY_COLUMNS else 1.0
        np.testing.assert_allclose(
            ours[f"pair_{name}"], pairs[name], rtol=1e-8, atol=1e-10 * scale, err_msg=name
        )
    for name in ("incentive_chosen", "incentive_rejected"):
        np.testing.assert_allclose(ours[f"pair_{name}"], predictions[name], rtol=1e-8)
    assert ours["pair_regime"].tolist() == predictions["regime"].tolist()
    assert len(set(ours["pair_regime"])) > 1
    different = ours.index != 5
    for name in ("change_chosen", "change_rejected"):
        np.testing.assert_allclose(ours[f"pair_{name}"][different], predictions[name][different], rtol=1e-6)


def test_answers_and_rewards_are_as_rft_sees_them(folder, finished, tmp_path):
    """The same draws, so the same rewards, gradients and bounds to the digit."""
    rft = run_rft(RftConfig(**answer_options(folder, tmp_path / "rft")))
    columns = [name for name in rft.prompts if name not in ("prompt", "prompt_hash")]
    ours = finished.prompts[columns]
    pd.testing.assert_frame_equal(ours, rft.prompts[columns], rtol=1e-7, atol=1e-7)


def test_one_gram_matrix_holds_answers_and_pair(folder, finished, policy):
    """Kept dot products against plain autograd on answers that are drawn again."""
    rows = finished.run.read_shards(ANSWERS)
    pairs = load_pairs(str(folder / "pairs.jsonl"))
    prompts = [Prompt(i, pairs[i].prompt) for i in (0, 1)]
    rollout = sample_answers(policy, prompts, Sampling(num_generations=8, max_completion_length=8))[1]
    assert list(rows["completions"][1]) == list(rollout.completions)
    batch = rollout.collate(policy.pad_id, tokenize_pair(policy.tokenizer, pairs[1]))
    assert batch.group_size == 10
    gram = AutogradEngine(policy.model, policy.parameters).gram(batch).numpy()
    np.testing.assert_allclose(rows["gram"][1], gram[:8, :8].ravel(), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(rows["pair_gram"][1], gram[8:].ravel(), rtol=1e-8, atol=1e-10)
    alone = collate([tokenize_pair(policy.tokenizer, pairs[1])], policy.pad_id)
    np.testing.assert_allclose(rows["pair_logps"][1], row_logps(policy.model, alone).numpy(), rtol=1e-10)


def test_a_real_step_on_the_reward_moves_the_pair_as_predicted(folder, finished, policy):
    """Parameters moved along the sample's RLOO gradient: the pair's log-probs change by reward_change_*."""
    rows, pairs = finished.run.read_shards(ANSWERS), load_pairs(str(folder / "pairs.jsonl"))
    prompts = [Prompt(i, pairs[i].prompt) for i in (0, 1)]
    rollout = sample_answers(policy, prompts, Sampling(num_generations=8, max_completion_length=8))[0]
    rewards = np.asarray(rows["rewards"][0])
    assert len(set(rewards)) > 1
    scores = AutogradEngine(policy.model, policy.parameters).scores(rollout.collate(policy.pad_id))
    weights, pair = torch.from_numpy(rloo_weights(rewards)), tokenize_pair(policy.tokenizer, pairs[0])
    batch = collate([pair], policy.pad_id)

    def moved(size: float) -> np.ndarray:
        for name, parameter in policy.parameters.items():
            parameter.data += size * (weights @ scores[name]).reshape(parameter.shape)
        found = row_logps(policy.model, batch).numpy()
        for name, parameter in policy.parameters.items():
            parameter.data -= size * (weights @ scores[name]).reshape(parameter.shape)
        return found

    slope = (
        moved(1e-3) - moved(-1e-3)
    ) / 2e-3  # the norms of a Llama are float32: smaller steps drown in rounding
    expected = finished.prompts.loc[0, ["reward_change_chosen", "reward_change_rejected"]].to_numpy(
        dtype=float
    )
    np.testing.assert_allclose(slope, expected, rtol=1e-3)


def test_a_broken_run_resumes_to_the_same_numbers(folder, finished, tmp_path):
    config = JointConfig(**answer_options(folder, tmp_path / "run"))
    with broken_at(5):
        run_joint(config)
    with pytest.raises(RunError, match="isn't finished.*Finish it with: entangle joint"):
        JointResult.load(tmp_path / "run")
    with recorded() as computed:
        pd.testing.assert_frame_equal(run_joint(config).prompts, finished.prompts)
    assert computed == [5, 6]
    with pytest.raises(RunError, match="losses"):
        run_joint(JointConfig(**answer_options(folder, tmp_path / "run", losses=("simpo",))))


def test_a_response_without_a_token_leaves_its_prompt_unmeasured(folder, tmp_path, policy):
    config = JointConfig(**answer_options(folder, tmp_path / "run"))
    pair = tokenize_pair(policy.tokenizer, load_pairs(str(folder / "pairs.jsonl"))[0])
    engine = AutogradEngine(policy.model, policy.parameters)
    for changes in ({"empty": True, "chosen_ids": []}, {"dropped": True}):
        work = PromptMeasurement(
            config,
            policy,
            engine,
            build_reward_function("length"),
            pairs={0: dataclasses.replace(pair, **changes)},
        )
        prompt = Prompt(0, PAIRS[0]["prompt"])
        row = work.row(prompt, work.rollouts([prompt])[0])
        assert row[next(iter(changes))] and "gram" not in row


def test_texts_stand_beside_the_numbers(finished):
    texts, rows = finished.run.table("texts.parquet"), finished.run.read_shards(ANSWERS)
    assert texts is not None and texts["index"].tolist() == [0, 1, 2, 3, 5]
    for text in texts.to_dict("records"):
        row = rows[rows["index"] == text["index"]].iloc[0]
        assert (text["prompt"], text["chosen"]) == (
            PAIRS[text["index"]]["prompt"],
            PAIRS[text["index"]]["chosen"],
        )
        rewards = dict(zip(row["completions"], row["rewards"], strict=True))
        if row["rewards"].min() == row["rewards"].max():
            assert text["best"] == text["worst"] == ""
        else:
            assert (rewards[text["best"]], rewards[text["worst"]]) == (1.0, 0.0)


def test_no_text_where_none_is_wanted(folder, tmp_path):
    config = JointConfig(**answer_options(folder, tmp_path / "run", save_text=False, limit=2))
    result = run_joint(config)
    assert result.run.read_json("provenance.json")["notes"][-1].startswith("1 pairs of the data set")
    assert not (tmp_path / "run" / "texts.parquet").exists()
    assert "prompt" not in result.prompts and "completions" not in result.run.read_shards(ANSWERS)
    assert "the sum" not in render(result.renderable(), width=140)


def test_answers_from_a_file_meet_their_pairs(folder, tmp_path):
    rows = [
        {"prompt": p, "completions": [" the sum", " four", " cats", " dogs"], "rewards": [0, 1, 0, 2]}
        for p in ("TL;DR:", "unknown")
    ]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = answer_options(
        folder, tmp_path / "run", rollouts=str(path), reward=None, reward_range=(0.0, 2.0)
    )
    result = run_joint(JointConfig(**options))
    assert result.prompts["index"].tolist() == [1] and result.prompts["reward_mean"].tolist() == [0.75]
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match="1 prompts\\) has a pair"):
        run_joint(JointConfig(**options | {"output_dir": str(tmp_path / "other")}))


def test_distinct_prompts_with_their_first_pairs(folder):
    pairs = load_pairs(str(folder / "pairs.jsonl"))
    found = prompts_of(pairs)
    assert list(found) == [0, 1, 2, 3, 5, 6]
    prompt, pair = found[1]
    assert (prompt.text, pair.chosen) == ("TL;DR:", " cats are better")
    assert prompt.columns == {"chosen": " cats are better", "rejected": " dogs"}
    assert list(prompts_of(pairs, 2)) == [0, 1]
    drawn = prompts_of(pairs, 3, seed=1)
    assert list(drawn) == sorted(drawn) == list(prompts_of(pairs, 3, seed=1)) and len(drawn) == 3


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "message"),
    [(("kto",), "rest of a batch"), (("wpo",), "weighs tokens"), (("nonsense",), "nonsense")],
)
def test_losses_that_cant_be_compared(folder, tmp_path, losses, message):
    with pytest.raises(ConfigError, match=message):
        run_joint(JointConfig(**answer_options(folder, tmp_path / "run", losses=losses)))


def test_options_that_make_no_sense():
    for changes, message in (
        ({"losses": ("dpo", "ipo")}, "one loss"),
        ({"signal_threshold": 0.0}, "signal_threshold"),
        ({"num_generations": 1}, "num_generations"),
    ):
        with pytest.raises(ConfigError, match=message):
            JointConfig(**changes)


def test_a_policy_without_reference_is_its_own(folder, tmp_path):
    """As TRL takes it at the start of a training; said, and kept with the run."""
    options = answer_options(folder, tmp_path / "run", adapter_name_or_path=None)
    with pytest.raises(ConfigError, match="--reference self"):
        run_joint(JointConfig(**options, reference="none"))
    result = run_joint(JointConfig(**options, limit=2))
    assert (result.prompts["pair_signal"] == 1).all() and (result.prompts["pair_margin"] == 0).all()
    assert any("the policy itself" in note for note in result.run.read_json("provenance.json")["notes"])


def test_what_the_data_says_is_kept_with_the_run(folder, tmp_path):
    """Prompts that are what both responses begin with: told by joint as by a probe."""
    texts = ["the cat sat on the mat", "the cat they said"]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(dict(zip(("chosen", "rejected"), texts, strict=True))) + "\n")
    options = answer_options(folder, tmp_path / "run") | {"dataset_name": str(file)}
    told = run_joint(JointConfig(**options)).run.read_json("provenance.json")["notes"]
    assert any("no column 'prompt'" in note for note in told)


# --- reading a run ------------------------------------------------------------------------------------------


def test_tables_and_figures_of_a_run(finished):
    text = render(JointResult.load(finished.run.path).renderable(), width=160)
    for part in (
        "6 prompts of pairs.jsonl, 5 measured",
        "Both signals in the same units",
        "sign unknown",
        "best against worst",
        "cosine of the pair, std of the reward",
        "all pairs of sampled answers",
        "The most telling prompts",
    ):
        assert part in text, part
    for name in ("quadrants.png", "entanglement.png"):
        assert (finished.run.path / name).stat().st_size > 5000


def test_telling_prompts_are_the_extremes():
    prompts = pd.DataFrame(
        {
            "index": range(6),
            "verdict": ["neither", "neither", "dpo_only", "rft_only", "rft_only", "both"],
            "reward_std": [0.02, 0.01, 0.03, 0.2, 0.4, 0.3],
            "pair_reward_cosine": [0.1, 0.2, -0.3, 0.1, -0.1, 0.5],
        }
    )
    assert [row["index"] for _, row in joint_tables.telling(prompts)] == [1, 2, 4, 2]


def test_a_prompts_markup_is_only_text(finished):
    texts = finished.run.table("texts.parquet")
    assert texts is not None
    shown = joint_tables.cards(
        finished.prompts.dropna(subset="verdict"), texts.assign(chosen="[bold]x[/bold] [/red]"), "dpo"
    )
    assert "[bold]x[/bold]" in render(shown, width=140)


def test_figures_survive_a_single_prompt(finished):
    one = finished.prompts.iloc[:1]
    summary = finished.summary | {"rank_correlations": {"cosine_and_std": {"rho": None}}}
    for draw in (signals.quadrants, signals.entanglement):
        draw(new_axes(), one, summary)


def test_command_line(folder, tmp_path, capsys):
    words = (
        f"joint --model_name_or_path {folder / 'policy'} --adapter_name_or_path {folder / 'adapter'} --dataset_name "
        f"{folder / 'pairs.jsonl'} --max_length 64 --limit 2 --num_generations 4 --max_completion_length 4 "
        f"--reward length:most=2 --losses simpo:beta=2 --no_plots --output_dir {tmp_path / 'run'}"
    )
    assert cli.main(words.split()) == 0
    assert "2 prompts of pairs.jsonl, 2 measured with 8 answers" in capsys.readouterr().out
    config = str(tmp_path / "run" / "config.yaml")
    assert cli.main(["joint", "--config", config, "--output_dir", str(tmp_path / "run")]) == 0
    assert "holds this run already" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["joint", "--losses", "nonsense"]) == 2
