"""The run folder: which options make the same run, and what to type to finish one."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from entangle.commands.across import AcrossResult
from entangle.commands.compare import CompareResult
from entangle.commands.filter import FilterResult
from entangle.commands.forecast.curves import ForecastResult
from entangle.commands.joint import JointResult
from entangle.commands.probe import ProbeResult
from entangle.commands.rft import RewardChange, RftResult
from entangle.commands.rft.result import PromptsResult
from entangle.commands.sweep import SweepResult
from entangle.commands.tokens import TokenResult
from entangle.commands.train import TrainResult
from entangle.commands.whatif import WhatIf
from entangle.commands.why import WhyResult
from entangle.config import ProbeConfig, RunOptions, TrainConfig, parse
from entangle.errors import RunError
from entangle.measure.measured_set import MeasuredSet
from entangle.runs.folder import RunFolder
from entangle.tables.base import Shown


@dataclass(frozen=True)
class Before(RunOptions):
    VERB: ClassVar[str] = "probe"

    size: int = 3


@dataclass(frozen=True)
class Since(Before):
    """The same command with options added."""

    names: tuple[str, ...] = ("a", "b")
    share: float = 0.5


def test_an_option_added_since_counts_as_its_default(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run.begin(Before(), {"data": "x"})
    run.begin(Since(), {"data": "x"})
    assert not run.changed_options(Since())
    assert run.changed_options(Since(share=0.25)) == {"share": (0.5, 0.25)}
    for other in (Since(share=0.25), Since(names=("a",)), Since(size=4)):
        with pytest.raises(RunError, match="holds another run .*there, .* now"):
            run.begin(other, {"data": "x"})
    with pytest.raises(RunError, match=r"input data: 'x' there, 'y' now"):
        run.begin(Since(), {"data": "y"})


def test_the_default_folder_stays_the_same_when_options_are_added():
    assert Before().run_path == Since().run_path
    assert (
        len({config.run_path for config in (Since(), Since(size=4), Since(share=0.25), TrainConfig())}) == 4
    )


@pytest.mark.parametrize("options", [ProbeConfig(losses=("dpo",)), TrainConfig(seed=1)])
def test_an_unfinished_run_names_the_command_that_made_it(options: RunOptions, tmp_path: Path):
    run = RunFolder(tmp_path / "a run")
    run.begin(options, {})
    with pytest.raises(RunError, match=f"Finish it with: entangle {options.VERB} --config") as error:
        RunFolder.open(run.path)
    _, _, *words = shlex.split(str(error.value).partition("with: ")[2])
    again, _ = parse(type(options), words, prog="x")
    assert again.run_path == run.path and not run.changed_options(again)


def test_a_run_of_another_command_is_refused_by_name(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run.begin(ProbeConfig(), {})
    run.write_json("summary.json", {})
    assert RunFolder.open(run.path, "probe").verb == "probe"
    for load in (RftResult.load, JointResult.load, TrainResult.load, CompareResult.load):
        with pytest.raises(
            RunError, match=r"Expected a run of entangle \w+ at .*; it holds one of entangle probe"
        ):
            load(run.path)
    (run.path / "config.yaml").write_text("limit: 3\n")  # as a hand may write it
    assert RunFolder.open(run.path, "train").verb is None


RESULTS = (
    AcrossResult,
    CompareResult,
    FilterResult,
    ForecastResult,
    JointResult,
    MeasuredSet,
    ProbeResult,
    RewardChange,
    RftResult,
    SweepResult,
    TokenResult,
    TrainResult,
    WhatIf,
    WhyResult,
)


def test_every_result_shows_itself():
    """What a command or a function gives back is drawn in a notebook as it is in the terminal."""
    here = {
        value
        for module in list(sys.modules.values())
        if module.__name__.startswith("entangle.")
        for value in vars(module).values()
        if isinstance(value, type) and hasattr(value, "renderable")
    }
    assert here - {Shown, PromptsResult} == set(RESULTS)
    for result in RESULTS:
        assert issubclass(result, Shown) and not result.__abstractmethods__
