"""LLaMA-Factory with the callback, with the contract that its source states (LLaMA-Factory 0.9.5).

`run_exp(args, callbacks)` takes its YAML as a dict, refuses keys that it doesn't know, and gives the callbacks to
a trainer of transformers that it makes itself; nobody tells them that trainer. Its training set has whole rows,
and labels that are -100 on the prompt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import yaml

from entangle.errors import ConfigError, UserError
from entangle.integrations.llamafactory import loss_of, read, run
from entangle.training import TrainingError
from entangle.training.training_set import training_pairs
from losses import DPO, ORPO, SimPO, build
from tests.training import runs
from tests.training.callback_runs import are_same_run, train

CONTENT = {"stage": "dpo", "pref_beta": 0.1, "pref_loss": "sigmoid", "entangle": {"pairs": 4, "every": 3}}


def as_labels(data: Any) -> Any:
    """TRL's tokenised rows as LLaMA-Factory has them."""

    def row(trl: dict[str, list[int]]) -> dict[str, list[int]]:
        prompt = trl["prompt_ids"]
        return {
            f"{side}_{name}": ids
            for side in ("chosen", "rejected")
            for name, ids in (
                ("input_ids", prompt + trl[f"{side}_ids"]),
                ("labels", [-100] * len(prompt) + trl[f"{side}_ids"]),
            )
        }

    return data.map(row)


def file_of(folder: Path, content: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dpo.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "dpo.yaml")


def test_a_training_is_probed_and_not_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = []

    def run_exp(args: dict[str, Any], callbacks: list[Any]) -> None:
        assert args == {key: CONTENT[key] for key in CONTENT if key != "entangle"} | {"pref_beta": 0.3}
        options = {"max_steps": 6, "logging_steps": 2, "beta": args["pref_beta"]}
        made.append(runs.trainer(tmp_path / "with", args=options, callbacks=callbacks))
        made[0].train_dataset = as_labels(made[0].train_dataset).remove_columns(
            ["prompt", "chosen", "rejected"]
        )
        made[0]._signature_columns = None
        made[0].args.remove_unused_columns = False
        made[0].train()

    tuner = ModuleType("llamafactory.train.tuner")
    tuner.run_exp = run_exp  # type: ignore[attr-defined]
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, tuner.__name__, tuner)
    run([file_of(tmp_path, CONTENT), "pref_beta=0.3"])
    assert are_same_run(made[0], train(tmp_path / "without", args={"beta": 0.3}))
    rows = pd.read_parquet(tmp_path / "with" / "entangle" / "steps.parquet")
    assert sorted(rows["step"].unique()) == [0, 3, 6] and rows["regime"].notna().all()
    start = rows[rows["step"] == 0]
    assert start["incentive_chosen"].tolist() == pytest.approx(
        [0.15] * 4, rel=1e-4
    )  # beta/2 at the reference
    sets = pd.read_parquet(tmp_path / "with" / "entangle" / "set.parquet")
    assert set(sets["step"]) == {0, 3, 6}


def test_its_own_rows_are_the_same_pairs_as_trls(tmp_path: Path) -> None:
    data = runs.trainer(tmp_path).train_dataset
    trl, labels = (training_pairs(rows, 5) for rows in (data, as_labels(data).select_columns(LABELS)))
    assert labels == trl
    row = {"chosen_input_ids": [1, 2, 3], "chosen_labels": [-100, 2, 3]}
    other = {"rejected_input_ids": [4, 5], "rejected_labels": [-100, 5]}
    with pytest.raises(TrainingError, match="other prompt tokens"):
        training_pairs([row | other], 1)
    with pytest.raises(TrainingError, match="several parts"):
        training_pairs([row | other | {"chosen_labels": [2, -100, 3]}], 1)
    for nothing in ([row], [], ["text"], iter(())):
        with pytest.raises(TrainingError, match="Give the pairs themselves"):
            training_pairs(nothing, 1)


LABELS = ["chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"]


def test_the_trained_loss_is_what_its_keys_name() -> None:
    def of(**keys: Any) -> Any:
        spec = loss_of({"stage": "dpo"} | keys)
        return None if spec is None else build(spec)

    assert of() == DPO(beta=0.1)
    assert of(pref_loss="simpo", pref_beta=2.0, simpo_gamma=1.0) == SimPO(beta=2.0, gamma=1.0)
    assert of(pref_loss="orpo", pref_beta=0.2) == ORPO(odds_weight=0.2)
    assert of(pref_loss="ipo", pref_beta=0.2).trl == "ipo" and of(pref_loss="hinge").trl == "hinge"
    for keys in (
        {"pref_loss": "kto_pair"},
        {"pref_ftx": 1.0},
        {"dpo_label_smoothing": 0.1},
        {"stage": "sft"},
    ):
        assert of(**keys) is None


def test_a_file_or_argument_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    for arguments in ([], ["missing.yaml"], ["--help"]):
        with pytest.raises(ConfigError, match="Expected LLaMA-Factory's YAML"):
            read(arguments)
    with pytest.raises(ConfigError, match="got list"):
        read([file_of(tmp_path, [1])])
    with pytest.raises(ConfigError, match="key=value"):
        read([file_of(tmp_path, CONTENT), "--stage"])
    with pytest.raises(ConfigError, match="under the key entangle"):
        run([file_of(tmp_path, {"stage": "dpo"})])
    if "llamafactory" not in sys.modules:
        with pytest.raises(UserError, match="can't be imported"):
            run([file_of(tmp_path, CONTENT)])
