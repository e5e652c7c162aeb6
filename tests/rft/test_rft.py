"""The command: rows from a model, resumable; tables, figures and summary from the rows alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from entangle import cli
from entangle.analysis.statistics import rank_correlation
from entangle.commands.rft import RftResult, prompt_rows, run_rft
from entangle.config import ModelOptions, RftConfig
from entangle.errors import ConfigError, RunError
from entangle.figures import rewards
from entangle.figures.style import new_axes
from entangle.measure.prompts import ANSWERS
from entangle.models import load_policy
from entangle.rewards.functions import RewardError
from entangle.rewards.gradients import gradient_product
from entangle.rewards.recorded import load_rollouts
from entangle.rewards.signals import Setting, gram_of, measure
from entangle.rewards.statistics import Support
from entangle.rewards.summary import Thresholds, summarise
from entangle.scores import AutogradEngine
from entangle.scores.jacobian import jacobian_norm
from entangle.tables.base import render
from tests.processes import run_on_two
from tests.rft.breaking import broken_at, recorded
from tests.tiny import llama, save_adapter, save_policy

WORDS = [
    "what is the sum?",
    "TL;DR:",
    "she said that",
    "the cat",
    "the other cat sat there too",
    "they think",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A policy with an adapter, and a file of prompts; one of them leaves no room for an answer."""
    path = tmp_path_factory.mktemp("rft")
    save_policy(path / "policy")
    save_adapter(path / "adapter", str(path / "policy"))
    rows = [{"prompt": word, "chosen": " the sum is four"} for word in [*WORDS, "the cat sat " * 30]]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder, out, **changes) -> RftConfig:
    given = dict(
        model_name_or_path=str(folder / "policy"),
        adapter_name_or_path=str(folder / "adapter"),
        dtype="float64",
        dataset_name=str(folder / "prompts.jsonl"),
        reward="length:least=3,most=6",
        num_generations=6,
        batch_size=12,
        max_completion_length=8,
        group_size=3,
        shard_size=3,
        output_dir=str(out),
        plots=False,
    )
    return RftConfig(**(given | changes))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> RftResult:
    return run_rft(options(folder, tmp_path_factory.mktemp("runs") / "run", plots=True, gamma_positions=2))


def test_every_prompt_has_a_row_and_the_one_without_room_says_so(finished):
    prompts = finished.prompts
    assert prompts["index"].tolist() == list(range(7))
    assert prompts["dropped"].tolist() == [False] * 6 + [True]
    assert prompts.loc[6, ["reward_mean", "grad_sq"]].isna().all()
    assert finished.summary["prompts"] == {
        "total": 7,
        "measured": 6,
        "dropped": 1,
        "empty": 0,
        "non_finite": 0,
    }
    assert finished.summary["answers"] == 36
    ended = np.concatenate(finished.run.read_shards(ANSWERS)["finished"].dropna().tolist())
    assert finished.summary["cut"]["count"] == int((~ended.astype(bool)).sum()) > 0
    notes = finished.run.read_json("provenance.json")["notes"]
    assert any("of the answers were cut at 8 tokens" in note for note in notes)
    assert sorted(f.name for f in finished.run.path.iterdir() if f.is_dir()) == ["answers"]
    norms = finished.run.read_shards(ANSWERS)["jacobian_norm"]
    assert norms.notna().tolist() == [True] * 2 + [False] * 5  # at as many prompts as were asked for
    assert finished.summary["setting"]["gamma"] == norms.max() > 0


def test_gram_and_log_probs_are_the_models(folder, finished):
    """The kept numbers against plain autograd on the kept answers."""
    row = finished.run.read_shards(ANSWERS).iloc[0]
    policy = load_policy(
        ModelOptions(str(folder / "policy"), adapter_name_or_path=str(folder / "adapter"), dtype="float64")
    )
    from entangle.rewards.rollouts import Prompt, Sampling, sample_answers

    prompts = [Prompt(i, word) for i, word in enumerate(WORDS[:2])]
    rollout = sample_answers(policy, prompts, Sampling(num_generations=6, max_completion_length=8))[0]
    assert list(row["completions"]) == list(rollout.completions)
    batch = rollout.collate(policy.pad_id)
    gram = AutogradEngine(policy.model, policy.parameters).gram(batch)
    np.testing.assert_allclose(row["gram"], gram.ravel().numpy(), rtol=1e-8, atol=1e-10)
    assert row["lengths"].tolist() == batch.lengths.tolist()


def test_table_is_a_function_of_the_kept_answers(finished):
    setting = finished.summary["setting"]
    support = Support(setting["low"], setting["high"], setting["is_binary"])
    again = prompt_rows(finished.run.read_shards(ANSWERS), Setting(support, 3, 8, setting["gamma"]))
    pd.testing.assert_frame_equal(again, finished.prompts)


def test_a_broken_run_resumes_to_the_same_numbers(folder, finished, tmp_path):
    """The second shard fails; the next start draws and computes only what is missing."""
    config = options(folder, tmp_path / "run", gamma_positions=2)
    with broken_at(4):
        run_rft(config)
    with recorded() as computed:
        result = run_rft(config)
    assert computed == [3, 4, 5, 6]
    pd.testing.assert_frame_equal(result.prompts, finished.prompts)
    with recorded() as computed:
        assert run_rft(config).summary == result.summary and not computed
    with pytest.raises(RunError, match="num_generations"):
        run_rft(options(folder, tmp_path / "run", gamma_positions=2, num_generations=5))


def test_answers_and_rewards_from_a_file(folder, tmp_path):
    rows = [
        {"prompt": w, "completions": [" the sum", " four", " cats", " dogs"], "rewards": [0, 1, 0, 2]}
        for w in WORDS[:2]
    ]
    rows[1]["rewards"] = [1, 1, 1, None]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = options(
        folder, tmp_path / "run", rollouts=str(tmp_path / "r.jsonl"), reward=None, reward_range=(0.0, 2.0)
    )
    result = run_rft(config)
    assert result.prompts["answers"].tolist() == [4, 3] and not result.prompts["non_finite"].any()
    assert result.prompts["reward_mean"].tolist() == [
        0.75,
        1.0,
    ]  # an answer without reward is left out, never 0
    told = result.run.read_json("provenance.json")["notes"]
    assert "1 answers have no reward (None or NaN) and are left out." in told
    policy = load_policy(
        ModelOptions(str(folder / "policy"), adapter_name_or_path=str(folder / "adapter"), dtype="float64")
    )
    batch = load_rollouts(str(tmp_path / "r.jsonl"), policy.tokenizer)[0].collate(0)
    gram = AutogradEngine(policy.model, policy.parameters).gram(batch).numpy()
    expected = gradient_product(gram, np.array([0.0, 1.0, 0.0, 2.0]))
    assert result.prompts.loc[0, "grad_sq"] == pytest.approx(expected, rel=1e-8)
    with pytest.raises(RewardError, match="--reward_range"):
        run_rft(
            options(
                folder,
                tmp_path / "x",
                rollouts=str(tmp_path / "r.jsonl"),
                reward=None,
                reward_range=(0.0, 1.0),
            )
        )


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_equal_one(folder, tmp_path):
    """`torchrun` on two gloo processes writes one folder, equal to a single process's."""
    config = options(folder, tmp_path / "one", shard_size=2)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.recorded))
    printed = run_on_two(
        "entangle", "rft", "--config", str(path), "--output_dir", str(tmp_path / "both"), "--no_plots"
    )
    assert printed.count("7 prompts of prompts.jsonl, 6 measured") == 1
    both, one = RftResult.load(tmp_path / "both"), run_rft(config)
    pd.testing.assert_frame_equal(both.prompts, one.prompts, rtol=1e-9, atol=1e-12)
    assert len(both.run.read_shards(ANSWERS)) == 7


# --- the measures of one prompt -----------------------------------------------------------------------------


def a_row(count: int = 8, seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=(count, 5))
    return {
        "rewards": draw.integers(0, 2, size=count).astype(float),
        "logps": -draw.uniform(1, 9, size=count),
        "ref_logps": -draw.uniform(1, 9, size=count),
        "lengths": draw.integers(1, 9, size=count),
        "finished": [True] * count,
        "gram": (scores @ scores.T).ravel(),
    }


BINARY = Setting(Support(0.0, 1.0, is_binary=True), group_size=4, max_length=8, gamma=2.0)


def test_kl_is_measured_apart_from_the_reward():
    """Rewards that are the log-ratios have KL's own gradient; without a reference there is none."""
    row = a_row()
    row["rewards"] = row["logps"] - row["ref_logps"]
    found = measure(row, Setting(group_size=4))
    assert found["kl_grad_sq"] == pytest.approx(found["grad_sq"], rel=1e-12)
    assert found["kl_reward_product"] == pytest.approx(found["grad_sq"], rel=1e-12)
    other = measure(a_row(), Setting())
    product = gradient_product(gram_of(a_row()), a_row()["rewards"], row["rewards"])
    assert other["kl_reward_product"] == pytest.approx(product, rel=1e-12)
    assert product != pytest.approx(other["grad_sq"], rel=0.01)
    assert found["kl"] == pytest.approx(float(np.mean(row["rewards"])))
    assert math.isnan(measure(row | {"ref_logps": np.full(8, np.nan)}, Setting())["kl_grad_sq"])
    assert measure(row | {"ref_logps": row["logps"]}, Setting())["kl_grad_sq"] == 0.0


def test_tied_answers_have_no_gradient_and_say_what_they_may_hide():
    found = measure(a_row() | {"rewards": np.ones(8)}, BINARY)
    assert (found["reward_std"], found["grad_sq"], found["grpo_grad_sq"], found["signal"]) == (0, 0, 0, 0)
    assert found["dead_probability"] == 1 and found["rloo_sample_norm"] == found["bound_trace"] == 0
    assert found["reward_hidden_std"] > 0.4 and found["bound_trace_high"] > 0


def test_bounds_stand_in_their_order():
    found = measure(a_row(), BINARY)
    assert found["bound_fisher"] <= found["bound_trace"]
    assert found["bound_length"] == pytest.approx(found["reward_std"] * 2 * math.sqrt(8))
    assert found["bound_paper"] == pytest.approx(6 * 8 * 2 * 0.5 ** (1 / 3) * found["reward_std"] ** (2 / 3))


def test_harmful_cell_is_small_std_with_low_mean():
    """Of 6 prompts two are flat and low, one flat and high."""
    rewards = np.array(
        [[0] * 8, [0] * 8, [1] * 8, [0, 1] * 4, [0, 0, 0, 1] * 2, [1, 1, 1, 0] * 2], dtype=float
    )
    prompts = pd.DataFrame([measure(a_row(seed=i) | {"rewards": r}, BINARY) for i, r in enumerate(rewards)])
    thresholds = Thresholds.choose(prompts, BINARY.support, 0.1, None)
    assert (thresholds.std, thresholds.mean) == (0.05, 0.5)
    summary = summarise(prompts, rewards, BINARY.support, thresholds)
    cells = summary["prevalence"]
    assert [cells[name]["count"] for name in ("small", "small_low", "small_high")] == [3, 2, 1]
    assert cells["small_low"]["low"] < 2 / 6 < cells["small_low"]["high"]
    assert summary["trl"]["frac_reward_zero_std"] == 0.5 and summary["tied"]["count"] == 3
    assert summary["trl"]["reward_std"] > summary["within_prompt_std"] > 0
    assert sum(map(sum, summary["histogram"]["counts"])) == 6
    assert summary["gradient"]["mean_sq"] == pytest.approx(prompts["grad_sq"].mean())
    kl = summary["kl_gradient"]
    assert kl["reward_product"] == pytest.approx(prompts["kl_reward_product"].mean())
    assert kl["mean_sq_error"] == pytest.approx(prompts["kl_grad_sq"].sem())


def test_true_prevalence_follows_the_ties():
    """With K = 8 ties in half of the prompts: at least (1/2 - q) / (1 - q) of them have a std below .4."""
    rewards = np.array([[0] * 8, [0, 1] * 4], dtype=float)
    prompts = pd.DataFrame([measure(a_row(seed=i) | {"rewards": r}, BINARY) for i, r in enumerate(rewards)])
    summary = summarise(prompts, rewards, BINARY.support, Thresholds(0.4, 0.5))
    assert summary["true_prevalence_low"] == pytest.approx((0.5 - 0.2**8 - 0.8**8) / (1 - 0.2**8 - 0.8**8))


def test_thresholds_without_a_range_follow_the_rewards():
    prompts = pd.DataFrame({"reward_variance": [0.0, 2.0], "reward_mean": [-3.0, 3.0]})
    thresholds = Thresholds.choose(prompts, Support(), 0.5, None)
    assert (thresholds.std, thresholds.mean) == (pytest.approx(0.5 * math.sqrt(10)), 0.0)


def test_rank_correlation_and_its_interval():
    x = pd.Series(range(20))
    assert rank_correlation(x, x**3)["rho"] == pytest.approx(1)
    row = rank_correlation(x, pd.Series([(7 * i) % 20 for i in range(20)]))
    assert row["low"] < row["rho"] < row["high"]
    assert math.isnan(rank_correlation(x, x * 0)["rho"])


# --- gamma --------------------------------------------------------------------------------------------------


def test_jacobian_norm_against_the_whole_jacobian():
    """Power iteration on a two-layer model: from below, growing with the steps, to the largest singular value."""
    model = llama(hidden=8, vocabulary=12).double()
    parameters = {n: p for n, p in model.named_parameters() if "q_proj" in n or "down_proj" in n}
    ids = torch.tensor([3, 1, 4, 1, 5])
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is p for p in parameters.values()))
    logits = model(input_ids=ids[None]).logits[0, -1]
    rows = [
        torch.cat([g.ravel() for g in torch.autograd.grad(z, list(parameters.values()), retain_graph=True)])
        for z in logits
    ]
    exact = float(torch.linalg.matrix_norm(torch.stack(rows), 2))
    found = [jacobian_norm(model, parameters, ids, steps=steps) for steps in (1, 3, 60)]
    assert found[0] < found[1] <= exact * (1 + 1e-12)
    assert found[2] == pytest.approx(exact, rel=1e-6)


# --- reading a run ------------------------------------------------------------------------------------------


def test_tables_and_figures_of_a_run(finished):
    text = render(RftResult.load(finished.run.path).renderable(), width=140)
    for part in (
        "7 prompts of prompts.jsonl, 6 measured",
        "small std and low mean",
        "TRL's reward_std is",
        "the paper's form",
    ):
        assert part in text, part
    for name in ("scatter.png", "map.png"):
        assert (finished.run.path / name).stat().st_size > 5000


def test_a_prompts_markup_is_only_text(finished):
    prompts = finished.prompts.assign(prompt="[bold]x[/bold] [/red]", reward_std=0.0, reward_mean=0.0)
    from entangle.tables.rft import prompt_table

    assert "[bold]x[/bold]" in render(prompt_table(prompts, finished.summary, 2), width=140)


def test_figures_survive_prompts_without_any_signal(finished):
    flat = finished.prompts.iloc[:2].assign(reward_std=0.0, grad_norm=0.0, grad_sq=0.0)
    for draw in (rewards.scatter, rewards.reward_map):
        draw(new_axes(), flat, finished.summary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"reward_range": (1.0, 0.0)}, "smaller number first"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(ConfigError, match=message):
        RftConfig(**changes)


def test_only_the_prompt_column_is_named(folder, tmp_path):
    for columns, message in ((("chosen=better",), "prompt=NAME.*chosen"), (("question",), "ours=theirs")):
        with pytest.raises(ConfigError, match=message):
            run_rft(options(folder, tmp_path / "run", columns=columns))


def test_command_line(folder, tmp_path, capsys):
    words = (
        f"rft --model_name_or_path {folder / 'policy'} --dataset_name {folder / 'prompts.jsonl'} --limit 2 "
        f"--num_generations 4 --max_completion_length 4 --reward format:pattern=a --output_dir {tmp_path / 'run'} "
        "--no_plots --temperature 0.8"
    )
    assert cli.main(words.split()) == 0
    captured = capsys.readouterr()
    assert "2 prompts of prompts.jsonl, 2 measured with 8 answers" in captured.out
    assert "drawn with temperature" in " ".join(captured.err.split())
    assert cli.main(["rft", "--reward", "nonsense"]) == 2
    assert (
        cli.main(
            ["rft", "--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "run")]
        )
        == 0
    )
