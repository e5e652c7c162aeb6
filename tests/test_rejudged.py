"""Other losses for a finished probe: judged on its stored scores as a fresh probe would, or refused in words."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from entangle.commands.probe import run as run_module
from entangle.commands.probe import run_probe
from entangle.errors import ConfigError, RunError
from entangle.runs.folder import RunFolder
from tests.probing import options, probe

FILES = ("summary.json", "set.json", "config.yaml")


def files_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_other_losses_are_judged_as_a_fresh_probe_judges_them(inputs, tmp_path, monkeypatch):
    """Summary, set, predictions and options byte for byte; no pair is measured, and a line says so."""
    first = options(inputs, tmp_path / "run", losses=("dpo", "kto"), modules=True)
    probe(first)
    before = files_of(tmp_path / "run")
    other = replace(first, losses=("cpo", "dpo:beta=0.5", "kto"), loss_batch_size=4)
    fresh = probe(replace(other, output_dir=str(tmp_path / "fresh")))

    def measured(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(run_module, "rows_of_shard", measured)
    monkeypatch.setattr(run_module, "judge", measured)
    console = Console(file=io.StringIO(), width=400)
    again = run_probe(other, console)
    assert "nothing was measured again" in console.file.getvalue()
    for name in FILES:
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "fresh" / name).read_text(), name
    pd.testing.assert_frame_equal(again.predictions, fresh.predictions)
    assert again.table(120).splitlines()[1:] == fresh.table(120).splitlines()[1:]
    after = files_of(tmp_path / "run")
    changed = {name for name in after if after[name] != before[name]}
    assert after.keys() == before.keys()
    assert changed == {*FILES, "predictions.parquet", "checksums.json"}
    sums = json.loads((tmp_path / "run" / "checksums.json").read_text())
    assert sums["set.json"] == json.loads((tmp_path / "fresh" / "checksums.json").read_text())["set.json"]
    console = Console(file=io.StringIO(), width=400)
    run_probe(other, console)
    assert "holds this run already" in console.file.getvalue()


def test_what_another_command_wrote_about_the_losses_before_is_named(inputs, tmp_path):
    config = options(inputs, tmp_path / "run", losses=("dpo",))
    probe(config)
    (tmp_path / "run" / "across.json").write_text("{}")
    console = Console(file=io.StringIO(), width=400)
    run_probe(replace(config, losses=("cpo",)), console)
    assert "Still about the losses before: across.json." in console.file.getvalue()


@pytest.mark.parametrize(
    ("start", "changes", "error", "words"),
    [
        ({}, {"losses": ("wpo",)}, ConfigError, "wpo weighs tokens"),
        ({"reference": "none", "losses": ("cpo",)}, {"losses": ("dpo",)}, ConfigError, "needs a reference"),
        ({}, {"losses": ("cpo",), "max_length": 63}, RunError, "holds another run .*max_length"),
        ({"verify": 1, "losses": ("dpo",)}, {"losses": ("cpo",)}, RunError, "real steps .*entangle whatif"),
    ],
)
def test_what_needs_the_model_again_is_refused_and_nothing_changes(
    inputs, tmp_path, start, changes, error, words
):
    config = options(inputs, tmp_path / "run", **start)
    probe(config)
    before = files_of(tmp_path / "run")
    with pytest.raises(error, match=words):
        probe(replace(config, **changes))
    assert files_of(tmp_path / "run") == before


def test_other_data_and_an_unfinished_run_are_another_run(inputs, tmp_path):
    rows = Path(inputs["data"]).read_text().splitlines()
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n")
    config = options(inputs, tmp_path / "run", losses=("dpo",), dataset_name=str(data))
    probe(config)
    data.write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(RunError, match="another run"):
        probe(replace(config, losses=("cpo",)))
    data.write_text("\n".join(rows) + "\n")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(RunError, match="another run .*losses"):
        probe(replace(config, losses=("cpo",)))


def test_a_set_without_sums_is_refused(inputs, tmp_path):
    config = options(inputs, tmp_path / "run", losses=("dpo",))
    probe(config)
    run = RunFolder(tmp_path / "run")
    run.write_json("set.json", {k: v for k, v in run.read_json("set.json").items() if k != "sums"})
    with pytest.raises(RunError, match="lacks the sums of its set"):
        probe(replace(config, losses=("cpo",)))
