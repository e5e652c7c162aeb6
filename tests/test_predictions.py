"""What 16-bit arithmetic may say of a verdict: right, or nothing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from entangle.analysis.geometry import RESOLUTION
from entangle.analysis.predictions import predict_losses
from entangle.commands.probe import ProbeResult, run_probe
from entangle.commands.whatif import what_if
from entangle.config import ProbeConfig
from losses import build
from tests.run_folders import synthetic_pairs

HALF = RESOLUTION[torch.bfloat16]


def at_log_ratio(ratio: float) -> pd.DataFrame:
    """One pair of a log-prob of -100 whose chosen response stands `ratio` above its reference."""
    rows = synthetic_pairs()[:1].copy()
    numbers = {"sq_chosen": 10.0, "sq_rejected": 10.0, "inner": 2.0, "gap_chosen": 8.0, "gap_rejected": 8.0}
    logps = {"logps_chosen": -100.0, "logps_rejected": -90.0, "ref_logps_rejected": -90.0}
    return rows.assign(**numbers, **logps, ref_logps_chosen=-100.0 - ratio)


@pytest.mark.parametrize(
    "ratio, resolution, regime",
    [
        (-1.0, HALF, "both_up"),  # the penalty is on, and 1 nat is more than the error of 0.4
        (-0.2, HALF, "degenerate"),  # it is on or off
        (0.2, HALF, "degenerate"),
        (1.0, HALF, "ideal"),
        (0.0, HALF, "ideal"),  # known to be the reference's
        (-0.2, RESOLUTION[torch.float32], "both_up"),
    ],
)
def test_a_verdict_at_a_kink_is_withheld_within_the_error_of_log_probs(ratio, resolution, regime):
    rows, loss = at_log_ratio(ratio), build("dpop")
    found = predict_losses(rows, [loss], resolution=resolution, batch_size=1)
    assert found["regime"].tolist() == [regime]
    judged = what_if(rows, [loss], knobs=(), loss_batch_size=1, resolution=resolution)
    assert judged.regimes[loss.label].tolist() == [regime]


def test_a_loss_without_reference_has_its_verdicts_in_16_bits_too():
    rows = at_log_ratio(0.0).assign(ref_logps_chosen=float("nan"), ref_logps_rejected=float("nan"))
    found = predict_losses(rows, [build("simpo")], resolution=HALF, batch_size=1)
    assert found["regime"].tolist() == ["ideal"]


def probe(folder: Path, **options) -> ProbeResult:
    config = ProbeConfig(limit=6, seed=1, losses=("dpo", "dpop"), output_dir=str(folder), **options)
    return run_probe(config, Console(quiet=True))


def test_16_bits_err_on_no_verdict(tmp_path):
    """A trained policy's log-ratios stay what they are, however near 0: their sign decides on DPOP's penalty."""
    exact = probe(tmp_path / "exact", dtype="bfloat16")
    half = probe(tmp_path / "half", dtype="bfloat16", score_dtype="bfloat16")
    assert (half.pairs["logps_chosen"] != half.pairs["ref_logps_chosen"]).all()
    both = half.predictions.merge(exact.predictions, on=["index", "loss"])
    told = both["regime_x"] != "degenerate"
    assert told.sum() >= 6 and (both["regime_x"] == both["regime_y"])[told].all()


def test_a_fresh_lora_is_its_reference_in_16_bits(tmp_path):
    rows = probe(tmp_path / "fresh", use_peft=True, score_dtype="bfloat16").pairs
    assert (rows["logps_chosen"] == rows["ref_logps_chosen"]).all()
    assert (rows["logps_rejected"] == rows["ref_logps_rejected"]).all()
