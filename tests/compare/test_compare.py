"""A comparison from a YAML file to its tables, on real training runs of a tiny model; its statistics by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console

import entangle.commands.compare.run
from entangle.analysis.agreement import agreement, directions, drift_agreement, drift_sentence, drifts
from entangle.analysis.curves import over_seeds
from entangle.analysis.ledger import PARTS
from entangle.cli import main
from entangle.commands.compare import CompareResult, run_compare, trials_of
from entangle.commands.compare.quality import means, summaries
from entangle.commands.train import TrainResult
from entangle.config import CompareConfig, ModelOptions, parse
from entangle.errors import ConfigError, RunError, UserError
from entangle.models import load_policy
from entangle.rewards.rollouts import load_prompts
from entangle.runs.progress import Interrupted
from entangle.tables.base import render
from tests.training import runs

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    runs.policy().save_pretrained(folder / "base")
    runs.tokenizer().save_pretrained(folder / "base")
    runs.pairs(20).to_json(folder / "pairs.jsonl")
    posts = [{"prompt": f"w{i} w{i + 1}", "summary": "w3 w4 w5"} for i in range(5)]
    (folder / "posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    return {
        "model_name_or_path": str(folder / "base"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "posts": str(folder / "posts.jsonl"),
    }


def options(inputs: dict[str, str], **changes) -> dict:
    given = {
        "model_name_or_path": inputs["model_name_or_path"],
        "dataset_name": inputs["dataset_name"],
        "lora_r": 2,
        "losses": ["dpo", "sft"],
        "seeds": [0, 1],
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_share": 0.25,
        "probe_every": 2,
        "save_steps": 0,
        "ledger": True,
        "quality_dataset_name": inputs["posts"],
        "quality_reference": "summary",
        "quality_samples": 2,
        "max_completion_length": 5,
    }
    return given | changes


def config(inputs: dict[str, str], **changes) -> CompareConfig:
    given = options(inputs, **changes)
    return CompareConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


@pytest.fixture(scope="module")
def finished(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "compare.yaml").write_text(yaml.safe_dump(options(inputs, output_dir=str(folder / "out"))))
    assert main(["compare", str(folder / "compare.yaml")]) == 0
    return CompareResult.load(folder / "out")


def test_numbers_are_those_of_the_runs(finished: CompareResult, inputs: dict[str, str]):
    """The end of each run's curve against what training itself measured, another way, of the held-out pairs."""
    trials = trials_of(config(inputs, output_dir=str(finished.run.path)))
    assert len(trials) == len(finished.runs) == 4
    for trial, (_, row) in zip(trials, finished.runs.iterrows(), strict=True):
        held = trial.run.table("held_out.parquet")
        assert (row["variant"], row["seed"], row["pairs"]) == (trial.variant, trial.seed, len(held))
        for side in ("chosen", "rejected"):
            change = held[f"logps_{side}_end"] - held[f"logps_{side}"]
            np.testing.assert_allclose(row[f"moved_{side}"], change.mean(), atol=1e-4)
        (file,) = trial.run.path.glob("summaries-*.parquet")
        texts = pd.read_parquet(file)
        assert len(texts) == 5 * 3
        greedy = texts[texts["decoding"] == "greedy"]
        np.testing.assert_allclose(row["rouge_l_greedy"], greedy["rouge_l"].mean())
    dpo = finished.runs[finished.runs["variant"] == "dpo"]
    best = finished.variants.set_index("variant").loc["dpo"]
    np.testing.assert_allclose(best["moved_chosen"], dpo["moved_chosen"].mean())
    assert best["moved_chosen_low"] == dpo["moved_chosen"].min() < best["moved_chosen"]
    assert set(finished.start) == set(means(texts))
    ledger = finished.ledger[finished.ledger["side"] == "chosen"].sort_values(["variant", "seed"])
    ends = finished.runs.sort_values(["variant", "seed"])["moved_chosen"]
    np.testing.assert_allclose(ledger["measured"], ends, atol=1e-4)
    np.testing.assert_allclose(ledger[list(PARTS)].sum(axis=1), ends, atol=1e-4)
    shown = render(finished.renderable(), 140)
    others = ledger[ledger["variant"] == "dpo"]["others"].mean()
    assert "what moved the chosen log-prob" in shown and f"{others:+.2f}" in shown
    assert "The rejected log-prob" in TrainResult.load(trials[0].run.path).table()
    for name in ("logps", "margin", "regimes", "final", "agreement", "ledger"):
        assert (finished.run.path / f"{name}.png").stat().st_size > 5000


def test_seeds_differ_in_order_only(finished: CompareResult, inputs: dict[str, str]):
    trials = trials_of(config(inputs, output_dir=str(finished.run.path)))
    starts = [trial.run.table("steps.parquet").query("step == 0") for trial in trials]
    for start in starts[1:]:  # one initial policy (a fresh LoRA changes nothing), the same held-out pairs
        assert start["index"].tolist() == starts[0]["index"].tolist()
        np.testing.assert_allclose(start["logps_chosen"], starts[0]["logps_chosen"], atol=1e-5)


def test_only_what_is_missing_is_trained(
    finished: CompareResult, inputs: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    out, trained = str(finished.run.path), []
    original = entangle.commands.compare.run.run_train

    def train(options, console):
        trained.append((options.loss, options.seed))
        return original(options, console)

    monkeypatch.setattr(entangle.commands.compare.run, "run_train", train)
    before = finished.runs.copy()
    again = run_compare(config(inputs, output_dir=out, plots=False), QUIET)
    assert not trained
    pd.testing.assert_frame_equal(again.runs, before)
    grid = {"vary": ["learning_rate=0.01,0.001"], "seeds": [0], "losses": ["dpo"]}
    run_compare(config(inputs, output_dir=out, plots=False, **grid), QUIET)
    assert trained == [("dpo", 0)] * 2
    with pytest.raises(RunError, match="another run"):  # an option of all runs has changed
        run_compare(config(inputs, output_dir=out, max_steps=2), QUIET)


def test_yaml_and_flags_describe_the_same_grid(inputs: dict[str, str], tmp_path: Path):
    grid = {
        "losses": ["dpo", {"name": "simpo", "beta": 2.0}],
        "seeds": [0, 1],
        "output_dir": "out",
        "vary": {"learning_rate": [1e-5, 1e-4], "mitigations": [[], [{"name": "select", "by": "ches"}]]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    read, _ = parse(CompareConfig, ["--config", str(tmp_path / "grid.yaml")], prog="x")
    trials = trials_of(read)
    assert len(trials) == 2 * 2 * 2 * 2
    assert len({trial.train.output_dir for trial in trials}) == 16
    assert trials[-1].variant == "simpo, learning_rate=0.0001, mitigations=select(by=ches)"
    assert trials[-1].train.learning_rate == 1e-4 and trials[-1].train.seed == 1
    assert trials[-1].train.mitigations == ({"name": "select", "by": "ches"},)
    flags = "--losses dpo simpo:beta=2.0 --seeds 0 1 --output_dir out --vary learning_rate=1e-5,1e-4".split()
    flags.append('mitigations=[[],[{"name":"select","by":"ches"}]]')
    assert trials_of(parse(CompareConfig, flags, prog="x")[0]) == trials


def test_settings_one_by_one_instead_of_every_combination(tmp_path: Path):
    """They share the folders of the same settings in a grid, so a finished grid may be extended by them."""
    ones = [{"mitigations": ["token_masking"]}, {"optim": "sgd", "learning_rate": 1e-5}, {"sft_share": 0.05}]
    file = tmp_path / "ones.yaml"
    grid = {"losses": ["dpo"], "seeds": [0, 1], "output_dir": "out", "vary": ones}
    file.write_text(yaml.safe_dump(grid, sort_keys=False))
    trials = trials_of(parse(CompareConfig, ["--config", str(file)], prog="x")[0])
    assert [trial.variant for trial in trials[::2]] == [
        "dpo, mitigations=token_masking",
        "dpo, optim=sgd, learning_rate=1e-05",
        "dpo, sft_share=0.05",
    ]
    trained = [trial.train for trial in trials[::2]]
    assert [(t.optim == "sgd", t.learning_rate, t.sft_share) for t in trained] == [
        (False, 1e-5, 0.0),
        (True, 1e-5, 0.0),
        (False, 1e-5, 0.05),
    ]
    vary = ('mitigations=[[],["token_masking"]]',)
    assert trials[0] in trials_of(CompareConfig(losses=("dpo",), output_dir="out", vary=vary))
    flags = ["--losses", "dpo", "--seeds", "0", "1", "--output_dir", "out", "--vary", *map(json.dumps, ones)]
    assert trials_of(parse(CompareConfig, flags, prog="x")[0]) == trials


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"loss": "ipo"}, "losses"),
        ({"seed": 1}, "seeds"),
        ({"limit": 3}, "train_share"),
        ({"losses": ()}, "one loss"),
        ({"vary": ("learning_rat=1",)}, "learning_rat"),
        ({"vary": ("max_steps=0",)}, "max_steps"),
        ({"vary": ({"learning_rat": 1},)}, "learning_rat"),
        ({"vary": ({},)}, "options of"),
        ({"vary": ("max_steps=1", {"max_steps": 2})}, "both"),
        ({"vary": ("{max_steps: 1",)}, "JSON or YAML"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes: dict, word: str):
    with pytest.raises(ConfigError, match=word):
        CompareConfig(**changes)


def test_one_value_stands_for_a_list_of_one(tmp_path: Path):
    given = {"losses": "dpo", "seeds": 3, "vary": {"mitigations": ["token_masking"], "optim": "sgd"}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(given))
    (trial,) = trials_of(parse(CompareConfig, ["--config", str(tmp_path / "one.yaml")], prog="x")[0])
    assert trial.variant == "dpo, mitigations=token_masking, optim=sgd" and trial.seed == 3
    assert trial.train.mitigations == ("token_masking",)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"losses": ["dpo", "dop"]}, "Unknown loss 'dop'"),
        ({"vary": ["mitigations=[[],[hope]]"]}, "Unknown mitigation 'hope'"),
        ({"quality_reference": "tldr"}, "'tldr'.*its columns are: summary"),
    ],
)
def test_what_a_later_run_would_stumble_over_is_refused_at_once(
    changes: dict, word: str, inputs: dict[str, str], tmp_path: Path
):
    with pytest.raises(UserError, match=word):
        run_compare(config(inputs, output_dir=str(tmp_path / "out"), **changes), QUIET)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stopped(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(entangle.commands.compare.run, "run_train", stopped)
    with pytest.raises(Interrupted, match="run 1 of 4.*the same command"):
        run_compare(config(inputs, output_dir=str(tmp_path / "out")), QUIET)


def test_a_foreign_folder_is_left_alone(inputs: dict[str, str], tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="no comparison"):
        run_compare(config(inputs, output_dir=str(tmp_path)), QUIET)


def test_greedy_summaries_are_the_most_probable_tokens(inputs: dict[str, str]):
    policy = load_policy(ModelOptions(inputs["model_name_or_path"]))
    posts = load_prompts(inputs["posts"])
    rows = summaries(policy, posts, "summary", 0, 5)
    for post, (_, row) in zip(posts, rows.iterrows(), strict=True):
        ids = policy.tokenizer(post.text)["input_ids"]
        for _ in range(5):
            ids = [*ids, int(policy.model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == policy.tokenizer.eos_token_id:
                break
        answer = ids[len(policy.tokenizer(post.text)["input_ids"]) :]
        assert row["length"] == len(answer)
        assert row["text"] == policy.tokenizer.decode(answer, skip_special_tokens=True)
        words, wanted = set(row["text"].split()), {"w3", "w4", "w5"}
        assert (row["rouge_l"] > 0) == bool(words & wanted)


def rows_of(*logps: tuple[float, float], predicted: tuple[float, float], seed: int = 0) -> pd.DataFrame:
    """Probe rows of a run: log-probs of the chosen responses of two pairs per step, the rejected ones mirrored."""
    return pd.DataFrame(
        [
            {
                "variant": "dpo",
                "loss": "dpo",
                "seed": seed,
                "step": step,
                "index": index,
                "logps_chosen": value,
                "logps_rejected": -value,
                "change_chosen": predicted[index],
                "change_rejected": -predicted[index],
            }
            for step, values in enumerate(logps)
            for index, value in enumerate(values)
        ]
    )


def test_agreement_by_hand():
    """Run 0: chosen +2, then -1, predicted +: one of two. Run 1: +4 and +4: two of two, so 3 of 4 in all."""
    first = rows_of((0.0, 0.0), (3.0, 1.0), (1.0, 1.0), predicted=(5.0, -1.0))
    second = rows_of((0.0, 0.0), (4.0, 4.0), (8.0, 8.0), predicted=(1.0, 1.0), seed=1)
    table = directions(pd.concat([first, second]))
    chosen = table[table["side"] == "chosen"]
    assert chosen["measured"].tolist() == [2.0, -1.0, 4.0, 4.0] and chosen["predicted"].tolist() == [
        2,
        2,
        1,
        1,
    ]
    assert chosen["agrees"].tolist() == [True, False, True, True]
    assert chosen["is_clear"].tolist() == [True, False, True, True]
    assert chosen["pair_agrees"].tolist() == [0.5, 0.0, 1.0, 1.0]
    found = agreement(table).set_index("side")
    assert found.loc["chosen", "agrees"] == found.loc["rejected", "agrees"] == 0.75
    assert found.loc["chosen", "clear_agrees"] == 1 and found.loc["chosen", "ideal_agrees"] == 0.75
    assert (found.loc["chosen", "low"], found.loc["chosen", "high"]) == (0.5, 1.0)
    assert found.loc["chosen", "runs"] == 2


def sets_of(*changes: tuple[float, float], metric: str = "sgd", seed: int = 0) -> pd.DataFrame:
    """What the set said at steps 0, 1, ...: predicted changes of both means."""
    columns = ["set_change_chosen", "set_change_rejected"]
    rows = pd.DataFrame(list(changes), columns=columns).assign(step=range(len(changes)))
    ends = {"set_drift_low": -1.0, "set_drift_high": 1.0, "metric": metric}
    return rows.assign(variant="dpo", loss="dpo", seed=seed, **ends)


def test_the_sets_agreement_by_hand():
    """Both means per interval: run 0 parts, then is inverted; run 1 parts twice. The later metric of a step counts."""
    first = rows_of((0.0, 0.0), (3.0, 1.0), (1.0, 1.0), predicted=(5.0, -1.0))
    second = rows_of((0.0, 0.0), (4.0, 4.0), (8.0, 8.0), predicted=(-3.0, 1.0), seed=1)
    second["logps_rejected"] += 2.0 * second["step"]  # rejected -2 a step, chosen +4: a drift of 1/6
    rows = pd.concat([first, second])
    sets = pd.concat(
        [
            sets_of((1.0, -1.0), (-1.0, 2.0), (9.0, 9.0)),
            sets_of((-1.0, -3.0), seed=1),
            sets_of((2.0, -1.0), metric="adamw", seed=1),
        ]
    )
    sides = directions(rows, sets).set_index(["seed", "step", "side"])
    assert sides["set_agrees"].loc[0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert (
        sides["set_agrees"].loc[1].tolist()[:2] == [1.0, 1.0] and sides["set_agrees"].loc[1, 1].isna().all()
    )
    assert agreement(sides.reset_index()).set_index("side").loc["chosen", "set_agrees"] == 1.0
    table = drifts(rows, sets)
    assert table["step"].tolist() == [0, 1, 0]
    assert table["measured"].tolist() == table["set_says"].tolist() == ["part", "inverted", "part"]
    assert table["pairs_say"].tolist() == ["part", "part", "inverted"]
    assert table["measured_drift"].tolist()[2] == pytest.approx((4 - 2) / (2 * 6))
    assert table["drift"].tolist()[2] == pytest.approx(1 / 6)
    assert table["gains"].tolist() == [True, False, True]
    found = drift_agreement(table).to_dict("records")[0]
    assert (found["set_agrees"], found["probes"], found["gains"], found["runs"]) == (1.0, 3, 1, 2)
    assert found["pairs_agree"] == pytest.approx(1 / 3) and found["ideal_agrees"] == pytest.approx(2 / 3)
    assert (
        found["set_off"] == found["pairs_off"] == found["ideal_off"] == pytest.approx(0.0)
    )  # of run 0 alone
    second = drift_agreement(table.assign(pairs_drift=0.5), by="seed").iloc[1]
    assert [second[name] for name in ("set_off", "pairs_off", "ideal_off")] == pytest.approx(
        [0, 1 / 3, 1 / 6]
    )
    said = drift_sentence(found)
    assert (
        "in 100 % (the pairs alone in 33 %; they parted as intended in 67 %)" in said
        and "(1 of them)" in said
    )


def test_band_over_seeds_is_mean_and_range():
    curves = pd.DataFrame(
        {
            "variant": "dpo",
            "loss": "dpo",
            "seed": [0, 1, 2],
            "step": 5,
            "moved_chosen": [-1.0, 0.0, 4.0],
        }
    )
    band = over_seeds(curves).iloc[0]
    assert (band["moved_chosen_low"], band["moved_chosen"], band["moved_chosen_high"]) == (-1, 1, 4)
