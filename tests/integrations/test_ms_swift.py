"""ms-swift's callback, with the contract that its source states (ms-swift 4.6).

`--external_plugins` imports a file of the user's; `--callbacks name` looks the name up in
`swift.callbacks.mapping.callbacks_map` and calls what is there with (args, trainer) before the trainer is complete,
then gives the result to the trainer as one of its callbacks. Rows of the training set have the columns of labels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from entangle.errors import ConfigError
from entangle.integrations.ms_swift import register
from entangle.training import PreferenceTrainer
from tests.training import runs
from tests.training.callback_runs import are_same_run, train


@pytest.fixture
def callbacks_map(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    mapping = ModuleType("swift.callbacks.mapping")
    mapping.callbacks_map = {}  # type: ignore[attr-defined]
    for name in ("swift", "swift.callbacks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, mapping.__name__, mapping)
    return mapping.callbacks_map


def test_a_training_is_probed_and_not_changed(callbacks_map: dict[str, Any], tmp_path: Path) -> None:
    class SwiftTrainer(PreferenceTrainer):
        def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **options: Any) -> None:
            made = [callbacks_map[name](args, self) for name in ("entangle",)]
            super().__init__(model, ref_model, args, callbacks=made, **options)

    register(pairs=4, every=3)
    args = {"max_steps": 6, "logging_steps": 2}
    trainer = runs.trainer(tmp_path / "with", SwiftTrainer, args=args)
    trainer.train()
    assert are_same_run(trainer, train(tmp_path / "without"))
    rows = pd.read_parquet(tmp_path / "with" / "entangle" / "steps.parquet")
    assert sorted(rows["step"].unique()) == [0, 3, 6] and rows["regime"].notna().all()
    assert any("entangle/set/drift" in row for row in trainer.state.log_history)


def test_a_wrong_option_is_refused_before_a_model_is_loaded(callbacks_map: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="evry"):
        register(pairs=4, evry=3)
    register("other", pairs=4)
    assert list(callbacks_map) == ["other"]
