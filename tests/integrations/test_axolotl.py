"""axolotl's plugin: with axolotl itself where it is installed, else with the contract that its source states.

The contract (axolotl 0.19, `integrations/base.py`, `integrations/config.py`, `core/builders`): the plugin is made from
`module.Class` by getattr and without arguments, inherits the hooks that it doesn't need from BasePlugin, names a
pydantic class by its path in `get_input_args`, which is imported with `from module import Class` and becomes a base of
the configuration; `add_callbacks_post_trainer(cfg, trainer)` returns callbacks, and axolotl adds each of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from entangle.errors import ConfigError
from entangle.integrations import axolotl
from tests.training import runs
from tests.training.callback_runs import are_same_run, train

PATH = "entangle.integrations.axolotl.EntanglePlugin"


class StandIn:
    """What this plugin takes of axolotl's BasePlugin: to be made without arguments."""


@pytest.fixture(params=["contract", "axolotl"])
def plugin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "axolotl":
        if importlib.util.find_spec("axolotl") is None:
            pytest.skip("axolotl isn't installed")
    else:
        base = ModuleType("axolotl.integrations.base")
        base.BasePlugin = StandIn  # type: ignore[attr-defined]
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
    axolotl._plugin.cache_clear()
    module, name = PATH.rsplit(".", 1)
    yield getattr(importlib.import_module(module), name)()
    axolotl._plugin.cache_clear()


def test_a_training_is_probed_and_not_changed(plugin: Any, tmp_path: Path) -> None:
    trainer = runs.trainer(tmp_path / "with", args={"max_steps": 6, "logging_steps": 2})
    cfg = {"entangle": {"pairs": 4, "every": 3}, "plugins": [PATH]}
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    assert are_same_run(trainer, train(tmp_path / "without"))
    rows = pd.read_parquet(tmp_path / "with" / "entangle" / "steps.parquet")
    assert sorted(rows["step"].unique()) == [0, 3, 6] and rows["regime"].notna().all()
    assert any("entangle/set/drift" in row for row in trainer.state.log_history)  # it knows the trainer


def test_without_the_key_nothing_is_added_and_a_wrong_one_is_refused(plugin: Any) -> None:
    assert plugin.add_callbacks_post_trainer({"plugins": [PATH]}, None) == []
    with pytest.raises(ConfigError, match="evry"):
        plugin.add_callbacks_post_trainer({"entangle": {"pairs": 4, "evry": 2}}, None)


def test_the_configuration_gains_the_key(plugin: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    scope: dict[str, Any] = {"Base": pydantic.create_model("AxolotlInputConfig")}
    module, name = plugin.get_input_args().rsplit(".", 1)
    exec(f"from {module} import {name}\nclass Config(Base, {name}):\n    pass", scope)
    given = {"pairs": 4, "loss": {"name": "ipo"}}
    assert scope["Config"](entangle=given).model_dump() == {"entangle": given}
    assert scope["Config"]().model_dump() == {"entangle": None}
    with pytest.raises(pydantic.ValidationError):
        scope["Config"](entangle=3)
