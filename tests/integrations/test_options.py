"""Options of the callback in another trainer's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entangle.errors import ConfigError, UserError
from entangle.integrations.options import callback_of
from losses import DPO, IPO

ROWS = [{"question": f"q{i}", "chosen": " yes", "rejected": " no"} for i in range(5)]


def test_options_are_those_of_the_callback_and_of_reading(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    options = {"pairs": str(file), "columns": {"prompt": "question"}, "limit": 3, "every": 7, "loss": "ipo"}
    callback = callback_of(options, loss={"name": "dpo"})
    assert [pair.prompt for pair in callback.pairs] == ["q0", "q1", "q2"]
    assert (callback.every, callback.loss) == (7, IPO())
    assert callback_of({"pairs": 4}, loss={"name": "dpo", "beta": 0.3}).loss == DPO(beta=0.3)
    assert callback_of({"pairs": 4, "loss": "dpo:beta=0.2"}).loss == DPO(beta=0.2)
    assert callback_of({"pairs": ROWS, "columns": {"prompt": "question"}}).pairs[4].prompt == "q4"


def test_what_makes_no_sense_is_refused() -> None:
    for options in (None, {}, "yes", True):
        with pytest.raises(ConfigError, match="pairs: probe.jsonl"):
            callback_of(options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="evry isn't known.*every"):
        callback_of({"pairs": 4, "evry": 3})
    with pytest.raises(ConfigError, match="pairs=4 with limit"):
        callback_of({"pairs": 4, "limit": 3})
    with pytest.raises(ConfigError, match="pairs=True"):
        callback_of({"pairs": True})
    with pytest.raises(UserError, match="something to watch"):
        callback_of({"every": 3})
