"""What a training run says of the set: the probed pairs as one at every probe, its warning, and where it is written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from entangle.analysis.set_verdict import ALERTS, live_verdict, set_alert
from entangle.analysis.sets import SetGeometry, sums_of_gram
from entangle.scores.autograd import AutogradEngine
from entangle.training import EntanglementCallback
from entangle.training.optimizer_steps import innermost, metric_of
from tests.training import runs
from tests.training.callback_runs import train

PAIRS = 6


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, EntanglementCallback, Path]:
    """A run of 6 steps with a probe of 6 training pairs every 3 steps."""
    folder = tmp_path_factory.mktemp("watched")
    callback = EntanglementCallback(PAIRS, every=3, live=True, output_dir=folder / "rows")
    return train(folder, callback), callback, folder / "rows"


def test_the_set_is_that_of_plain_autograd(watched: tuple[Any, EntanglementCallback, Path]) -> None:
    """The last probe's rows against the Gram matrix of autograd scores, plain and under Adam's preconditioner."""
    done, callback, folder = watched
    rows = pd.read_parquet(folder / "set.parquet")
    assert rows["step"].tolist() == [0, 3, 3, 6, 6]
    assert rows["metric"].tolist() == ["sgd", *["sgd", "adamw"] * 2]
    done.model.__dict__.pop("forward", None)
    probe = callback._probe_set(done.args, done.model, done.processing_class, done.get_train_dataloader())
    ((pairs, batch),) = probe.passes()
    engine = AutogradEngine(done.model, probe.policy.parameters)
    metric = metric_of(innermost(done.optimizer), probe.policy.parameters)
    steps = pd.read_parquet(folder / "steps.parquet").query("step == 6")
    incentive = [float(steps[f"incentive_{side}"].mean()) for side in ("chosen", "rejected")]
    for name, p in (("sgd", None), ("adamw", metric)):
        gram = engine.gram(batch, metric=p)
        sums = sums_of_gram(gram, torch.arange(len(pairs)), [pair.prompt_hash for pair in pairs])
        expected = SetGeometry.from_sums(sums)
        row = rows[(rows["step"] == 6) & (rows["metric"] == name)].iloc[0]
        move = expected.move(*incentive)
        assert row["set_pairs"] == len(pairs) == PAIRS
        assert row["set_cosine"] == pytest.approx(expected.cosine.value, rel=1e-3, nan_ok=True)
        assert row["set_rho"] == pytest.approx(incentive[0] / incentive[1])
        assert row["set_change_chosen"] == pytest.approx(move.chosen.value, rel=1e-3)
        assert row["set_change_rejected_high"] == pytest.approx(move.rejected.high, rel=1e-3)
        assert row["set_drift"] == pytest.approx(move.drift.value, rel=1e-3, nan_ok=True)
        assert row["set_regime"] == move.regime


def test_the_set_is_logged_and_the_tables_hold_what_is_logged(
    watched: tuple[Any, EntanglementCallback, Path],
) -> None:
    done, _, folder = watched
    logged = [row for row in done.state.log_history if "entangle/set/pairs" in row]
    assert [row["step"] for row in logged] == [0, 3, 6]
    rows = pd.read_parquet(folder / "set.parquet")
    assert logged[2]["entangle/set/change_chosen_adamw"] == rows["set_change_chosen"].iloc[-1]
    assert logged[2][f"entangle/set/{rows['set_regime'].iloc[-2]}"] == 1
    batches = pd.read_parquet(folder / "batches.parquet")
    assert batches["step"].tolist() == [2, 3, 4, 6]  # epochs of 4 steps: the first step of each has no memory
    live = [row for row in done.state.log_history if "entangle/set/live_pairs" in row]
    assert [row["step"] for row in live] == [6] and live[0]["entangle/set/live_pairs"] == 16


def content(regime: str, drift: float, low: float, high: float, is_certain: bool = True) -> dict[str, Any]:
    found = {"value": drift, "low": low, "high": high, "has_meaning": True, "pairs_needed": None}
    return {
        "pairs": 64,
        "losses": {"dpo": {"drift": found, "regime": regime, "is_certain": is_certain}},
    }


def test_what_is_warned_of() -> None:
    falls = content("both_down", -2.4, -3.0, -1.8)
    assert set_alert(falls, "dpo") == (
        "Both log-probs fall",
        "As a set, these 64 pairs make both log-probs fall under dpo: each nat of margin comes with 2.4 nats (1.8 to "
        "3) of fall of both.",
    )
    assert set_alert(content("both_up", 3.3, 2.2, 4.4), "dpo")[0] == ALERTS["rise"]  # pyright: ignore
    assert set_alert(content("inverted", 0.0, -1.0, 1.0), "dpo")[0] == ALERTS["inverted"]  # pyright: ignore
    for silent in (
        content("ideal", 0.1, 0.0, 0.2),
        content("both_down", -1.0, -3.0, 0.4, is_certain=False),
    ):
        assert set_alert(silent, "dpo") is None
    said = live_verdict(falls["losses"]["dpo"], 16, 64)
    assert said.endswith("both log-probs of fresh pairs fall: 2.4 nats (1.8 to 3) for each nat of margin.")


@pytest.mark.parametrize(
    ("found", "share", "titles"),
    [
        (content("both_up", 3.3, 2.2, 4.4), 0.9, ["Both log-probs rise"]),
        (content("ideal", 0.1, 0.0, 0.2), 0.9, []),
        (content("both_down", -1.0, -3.0, 0.4, is_certain=False), 0.9, ["Both log-probs fall"]),
        (content("both_down", -1.0, -3.0, 0.4, is_certain=False), 0.4, []),
        (None, 0.9, ["Both log-probs fall"]),
    ],
)
def test_the_set_decides_and_pairs_where_it_cannot(
    found: dict[str, Any] | None, share: float, titles: list[str], tmp_path: Path, caplog: Any
) -> None:
    """0.9 of the pairs are predicted to fall: a set that is known says more; a set that isn't leaves it to them."""
    from entangle.training.probing import Probed

    callback = EntanglementCallback(PAIRS, every=9, loss="dpo")
    callback._args, callback._loss = runs.arguments(tmp_path), callback.loss
    sets = {} if found is None else {"sgd": found}
    caplog.set_level(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    for _ in range(2):
        callback._warn_of_probe(7, Probed(pd.DataFrame(index=range(PAIRS)), sets), share)
    logger.removeHandler(caplog.handler)
    assert [record.message.partition(":")[0] for record in caplog.records] == titles
