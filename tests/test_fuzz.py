"""Whatever a file of options or of a finished run holds: it is read, or refused in words; never an uncaught error.

500 mutations per kind of file with a fixed seed stay in the suite; `python -m tests.test_fuzz 20000` runs more.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import pytest

from entangle.cli import COMMANDS
from entangle.commands.probe import ProbeResult
from entangle.config import RunOptions, read_yaml
from entangle.errors import UserError
from entangle.measure.reload import options_of
from entangle.runs.folder import RunFolder
from tests.mutations import broken, json_with_a_fault, options_with_a_fault
from tests.run_folders import synthetic_pairs, synthetic_run

COUNT = 500
SLOWEST = 5.0
"""Seconds that one file may take: the first one imports what it needs."""

FOR_TRL = {
    "model_name_or_path": "x/y",
    "dataset_name": "x/z",
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1, 0.2],
    "beta": 0.1,
    "learning_rate": "1e-5",
    "save_strategy": "no",
    "use_cpu": True,
    "lora_dropout": 0.1,
    "use_peft": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "output_dir": "out",
    "lora_target_modules": "all-linear",
}

RUN_FILES = (
    "config.yaml",
    "identity.json",
    "summary.json",
    "provenance.json",
    "checksums.json",
    "predictions.parquet",
    "texts.parquet",
    "pairs/00000.parquet",
)


def survives(act: Callable[[], object], told: str) -> bool:
    """Whether an act ends well; a refusal is fine, but it must say something. Anything else is an uncaught error."""
    start = time.monotonic()
    try:
        act()
        ended_well = True
    except UserError as error:
        assert len(str(error)) > 20, told
        ended_well = False
    assert time.monotonic() - start < SLOWEST, f"slow: {told}"
    return ended_well


def fuzz_options(command: str, count: int, folder: Path, seed: int = 0) -> int:
    """Files of options of a command; how many of them were accepted."""
    draw, cls = random.Random(f"{command} {seed}"), COMMANDS[command].config
    keys, file, accepted = [field.name for field in fields(cls)], folder / "options.yaml", 0
    plain = json.loads(json.dumps(asdict(cls())))
    for number in range(count):
        some = {key: plain[key] for key in draw.sample(keys, min(6, len(keys)))}
        start = draw.choice([{}, FOR_TRL, some])
        file.write_bytes(options_with_a_fault(start, keys, draw))

        told = f"{command} {seed} {number}: {file.read_bytes()[:300]!r}"
        accepted += survives(partial(read_options, file, cls), told)
    return accepted


def read_options(file: Path, cls: type) -> None:
    """What a command does with its file before it begins."""
    options = cls(**read_yaml(file, cls).values)
    if isinstance(options, RunOptions):
        assert options.run_path and options.recorded


def fuzz_run(name: str, count: int, whole: Path, folder: Path, seed: int = 0) -> int:
    """A finished run with a fault in one file; how often it could still be read."""
    draw, content, read = random.Random(f"{name} {seed}"), (whole / name).read_bytes(), 0
    target = folder / "run" / name
    shutil.copytree(whole, folder / "run", dirs_exist_ok=True)
    for number in range(count):
        if draw.random() < 0.05:
            target.unlink()
        elif name.endswith(".json") and draw.random() < 0.6:
            target.write_text(json.dumps(json_with_a_fault(json.loads(content), draw)))
        else:
            target.write_bytes(broken(content, draw))
        is_changed = not target.is_file() or target.read_bytes() != content
        has_checksums = draw.random() < 0.5 or name == "checksums.json"
        if not has_checksums:  # as a run that was made without
            (folder / "run" / "checksums.json").unlink()
        is_read = survives(partial(read_run, folder / "run", name), f"{name} {seed} {number}")
        is_checked = has_checksums and name not in ("config.yaml", "checksums.json")
        assert not (is_read and is_checked and is_changed), (
            f"read though it was changed: {name} {seed} {number}"
        )
        read += is_read
        shutil.copy(whole / "checksums.json", folder / "run")
        target.write_bytes(content)
    return read


def read_run(path: Path, name: str) -> None:
    """What commands read of a finished probe's file."""
    run = RunFolder.open(path, "probe")
    if name == "config.yaml":
        options_of(run)
        assert run.resume_command
    elif name == "checksums.json":
        ProbeResult.load(path)
    elif name.startswith("pairs"):
        run.pairs()
    elif name.endswith(".json"):
        run.read_json(name)
    else:
        run.read_table(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("whole"))


def finished_run(folder: Path) -> Path:
    return synthetic_run(folder / "run", synthetic_pairs(6), losses=("dpo", "cpo")).path


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_the_wrong_kind_are_refused_in_words(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accepted = fuzz_options(command, COUNT, tmp_path)
    assert 0 < accepted < COUNT


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_damaged_run_is_refused_in_words(name, whole, tmp_path):
    assert fuzz_run(name, COUNT, whole, tmp_path) < COUNT


@pytest.mark.parametrize("name", RUN_FILES[1:])
def test_the_damaged_file_is_named_with_what_makes_it_again(name, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"{" if name.endswith("json") else b"PAR1")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=f"{name} is damaged: .*(Delete it|Make the run again)"):
        run.read_json(name) if name.endswith("json") else run.read_table(name)


def test_a_changed_number_and_a_lost_shard_are_found(whole, tmp_path):
    """Valid JSON, and a folder with one shard fewer, would otherwise be read as if nothing had happened."""
    shutil.copytree(whole, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    summary = run.read_json("summary.json")
    (run.path / "summary.json").write_text(json.dumps(summary | {"pairs": 7}))
    with pytest.raises(UserError, match="summary.json is damaged: it isn't what the run wrote. Delete it"):
        ProbeResult.load(run.path)
    run.write_json("summary.json", summary)
    assert ProbeResult.load(run.path).summary == summary
    run.write_json("provenance.json", {"resolution": 1e-6})  # what is written later counts
    assert run.read_json("provenance.json") == {"resolution": 1e-6}
    (run.path / "pairs" / "00001.parquet").unlink()
    with pytest.raises(UserError, match="pairs/00001.parquet is damaged: it isn't there"):
        run.pairs()
    (run.path / "checksums.json").unlink()  # a run that was made without
    assert len(run.pairs()) == 3


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        original, done = finished_run(Path(place) / "whole"), 0
        share = -(-wanted // (len(COMMANDS) + len(RUN_FILES)))
        for each in COMMANDS:
            taken = fuzz_options(each, share, Path(place), seed=1)
            done += share
            print(f"options of {each}: {share} files, {taken} accepted", flush=True)
        for each in RUN_FILES:
            taken = fuzz_run(each, share, original, Path(place) / "damaged", seed=1)
            done += share
            print(f"{each}: {share} files, {taken} still readable", flush=True)
        print(f"{done} files, 0 uncaught errors, none slower than {SLOWEST} s")
