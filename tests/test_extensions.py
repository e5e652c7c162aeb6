"""A command, diagnostic, loss, layer rule, reward, format or mitigation is added in one place; all else follows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.extended import ROOT, extended


@pytest.fixture(scope="module")
def folder(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package with its toys lies, and what a process wrote that ran on it."""
    folder = extended(tmp_path_factory.mktemp("extended"))
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.extended", inputs["base"]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())


def recorded(run: Path) -> dict[str, Any]:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_command_is_its_file_and_its_line(found):
    assert "Toys: zebra A toy." in found["help"][1]
    assert "--size INT" in found["zebra --help"][1] and "How large it is." in found["zebra --help"][1]
    assert found["zebra"] == [3, "zebra of 3 Kept: nowhere"]
    assert found["zebra.yaml"] == [0, "zebra of 0 Kept: nowhere"]
    assert "- [`zebra`](commands/zebra.md): A toy." in found["hooks"]


def test_a_diagnostic_is_its_file(folder, found):
    assert "squeezing,stripes}" in found["probe --help"][1].replace(" │ │ ", "")
    assert found["probe"][0] == 0 and recorded(folder / "probed")["diagnostics"] == ["stripes"]
    rows = pd.concat(map(pd.read_parquet, (folder / "probed" / "pairs").glob("*.parquet")))
    assert (rows["stripes"] == rows["length_chosen"] + rows["length_rejected"]).all()
    page = (folder / "page.html").read_text()
    assert "Stripes of both responses." in page and "n_w + n_l" in page
    assert "`stripes`" in found["hooks"]


def test_a_format_is_its_file_and_is_taken_before_the_one_that_takes_all(folder, found):
    assert "trl,zebra}" in found["probe --help"][1].replace(" │ │ ", "")
    texts = pd.read_parquet(folder / "probed" / "texts.parquet")
    assert sorted(texts["chosen"]) == sorted(" sat" * (i % 3 + 1) + f" {i}" for i in range(8))
    assert "| `zebra` | by itself | `black` is chosen, `white` is rejected |" in found["hooks"]


def test_a_loss_is_its_class(folder, found):
    assert "zebra" in found["losses"][1] and "-ln s(beta (w - l) / 2)" in found["losses zebra"][1]
    assert "<code>zebra</code></b> Zebra" in found["hooks"], "the list of the documentation"
    assert found["tests"] == ["zebra", "zebra(beta=0.18)"]
    assert recorded(folder / "probed")["losses"] == [{"name": "zebra", "beta": 0.2}]
    assert "zebra(beta=0.2)" in found["probe"][1] and "zebra(beta=0.2)" in (folder / "page.html").read_text()


def test_a_reward_function_is_its_class(folder, found):
    assert "function,zebra}" in found["rft --help"][1].replace(" │ │ ", "")
    assert found["rft"][0] == 0 and recorded(folder / "rewarded")["reward"] == "zebra"
    assert "zebra" in found["rft"][1]


def test_a_mitigation_is_its_class(folder, found):
    assert "select,zebra}" in found["train --help"][1].replace(" │ │ ", "")
    assert found["train"][0] == 0 and recorded(folder / "trained")["mitigations"] == ["zebra"]
    assert "zebra" in found["train"][1] and "| `zebra` | Half of every incentive. | a toy |" in found["hooks"]


def test_a_layer_rule_is_its_function(found):
    assert found["covered"] == ["model.layers.0.mlp.scale"]


OWN = '''
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from entangle.analysis.mitigations import Rescaling
from entangle.rewards.functions import RewardFunction
from losses import PreferenceLoss, register


@register
class Loss(PreferenceLoss):
    """Zebra crossing: -beta (w - l)."""

    name: ClassVar = "zebra_crossing"
    ratio: ClassVar = "1"
    beta: float = 0.1

    def per_pair(self, logps):
        return -self.beta * logps.policy_margin


@dataclass(frozen=True)
class Reward(RewardFunction):
    stripes: int = 1
    name: ClassVar = "zebra_reward"

    def __call__(self, answers):
        return np.full(len(answers.completions), float(self.stripes))


@dataclass(frozen=True)
class Mitigation(Rescaling):
    name: ClassVar = "zebra_mitigation"
    source: ClassVar = "nowhere"

    def factors(self, incentives, norm_chosen, norm_rejected, state, total=None):
        return torch.ones_like(norm_chosen), torch.ones_like(norm_rejected)
'''


def test_classes_of_the_users_own_go_by_their_module_even_where_it_is_named_as_the_loss(
    tmp_path, monkeypatch, capsys
):
    from entangle.analysis.mitigations import MITIGATIONS, build_mitigation
    from entangle.cli import main
    from entangle.rewards.functions import REWARD_FUNCTIONS, AnswerSet, build_reward_function
    from losses import CATALOGUE

    (tmp_path / "zebra_crossing.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        for _ in range(2):  # once when it is imported, once when it is known
            assert main(["losses", "zebra_crossing:Loss:beta=0.5"]) == 0
            said = capsys.readouterr().out
            assert "beta=0.5" in said and "family" in said
        assert main(["losses"]) == 0 and "zebra_crossing" in capsys.readouterr().out
        for spec, wanted in (("zebra_crossing:Reward", 1.0), ("zebra_crossing:Reward:stripes=4", 4.0)):
            assert build_reward_function(spec)(AnswerSet("a", ("b", "c"))).tolist() == [wanted, wanted]
        assert build_mitigation("zebra_crossing:Mitigation").config == {"name": "zebra_mitigation"}
        assert "zebra_reward" in REWARD_FUNCTIONS
    finally:
        CATALOGUE.pop("zebra_crossing", None)
        MITIGATIONS.pop("zebra_mitigation", None)
        REWARD_FUNCTIONS.pop("zebra_reward", None)
        sys.modules.pop("zebra_crossing", None)
