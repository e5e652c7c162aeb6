"""`entangle probe --verify`: real steps confirm right incentives, and wrong ones make the command fail."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from entangle.analysis.real_steps import STEP, summarise_steps, summarise_verification, verification_sentences
from entangle.cli import main
from entangle.commands.probe import ProbeResult
from tests.probing import write_rows
from tests.tiny import save_adapter, save_policy


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("verify")
    base = save_policy(folder / "base")
    adapter = save_adapter(folder / "adapter", base)
    data = write_rows(folder / "rows.jsonl", 6)
    return [
        *("probe", "--model_name_or_path", base, "--adapter_name_or_path", adapter, "--dataset_name", data),
        *("--verify", "4", "--max_length", "64"),
    ]


def test_right_incentives_pass(arguments, tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main([*arguments, "--output_dir", run, "--losses", "dpo", "simpo", "dpop", "cpo"]) == 0
    assert "Real steps confirm the predictions: all 16" in capsys.readouterr().out
    verification = ProbeResult.load(run).summary["verification"]
    assert all(row["fails"] == [] for row in verification.values())


@pytest.mark.parametrize(
    ("loss", "label", "limits", "said"),
    [
        ("HalfPush", "half_push", {"slope", "error_ratio"}, "times the predicted ones"),
        ("DoubledBoth", "doubled", {"slope", "error_ratio"}, "are 0.5 times the predicted ones"),
        ("Slightly", "slightly", {"error_ratio"}, "must by at least 3"),
    ],
)
def test_wrong_incentives_fail(arguments, tmp_path, capsys, loss, label, limits, said):
    """Exit status 1, which loss, which limit, and what it is for; a right loss beside it isn't blamed."""
    run = str(tmp_path / "run")
    asked = [*arguments, "--output_dir", run, "--losses", "simpo", f"tests.wrong_losses:{loss}"]
    assert main(asked) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "VERIFICATION FAILED under " + label in shown and said in shown and run in shown
    assert "FAILED under simpo" not in shown
    verification = ProbeResult.load(run).summary["verification"]
    assert limits <= set(verification[label]["fails"]) and verification["simpo"]["fails"] == []
    assert main(asked) == 1  # the finished run says so again


def steps_of(predicted: np.ndarray, factor: float = 1.0, curvature: float = 2.0) -> pd.DataFrame:
    def measured(step: float) -> np.ndarray:
        return factor * step * predicted + curvature * (step * predicted) ** 2

    return pd.DataFrame(
        {
            "index": np.arange(len(predicted)) // 2,
            "loss": "dpo",
            "predicted": predicted,
            "measured": measured(1),
            "measured_half": measured(0.5),
            "floor": STEP**2,
        }
    )


def test_curvature_alone_is_no_failure():
    """A remainder ten times the usual moves the slope; its first-order part stays 1."""
    steps = steps_of(np.array([STEP, -STEP / 2, STEP, STEP / 4]), curvature=10.0)
    found = summarise_steps(steps)
    assert found["slope"] > 1.1 and found["slope_first_order"] == pytest.approx(1) and not found["fails"]


def test_one_loss_of_many_cannot_hide():
    """Over all losses the slope is within its limit; the one that is wrong is named."""
    right = [steps_of(np.array([STEP, -STEP / 2])).assign(loss=f"right_{i}") for i in range(20)]
    wrong = steps_of(np.array([STEP, -STEP / 2]), factor=-1.0).assign(loss="wrong")
    verification = summarise_verification(pd.concat([*right, wrong]))
    (sentence,) = verification_sentences(verification)
    assert sentence.startswith("VERIFICATION FAILED under wrong: 0 of 2 signs agree")


def test_error_within_the_arithmetics_is_not_judged():
    steps = steps_of(np.array([STEP, -STEP / 2]), curvature=0.0)
    steps["measured_half"] += 1e-5
    assert summarise_steps(steps)["fails"] == ["error_ratio"]
    assert summarise_steps(steps.assign(floor=STEP**2 + 1e-4))["fails"] == []


def test_no_step_verifies_nothing():
    nothing = summarise_verification(steps_of(np.array([])))
    assert "Nothing is verified" in verification_sentences(nothing)[0]


def test_sixteen_bits_verify_nothing(arguments, tmp_path, capsys):
    """A log-prob's own error is larger than the step: neither a failure nor a confirmation."""
    asked = [
        *arguments,
        "--output_dir",
        str(tmp_path / "run"),
        "--losses",
        "dpo",
        "--score_dtype",
        "bfloat16",
    ]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "Nothing is verified" in shown and "confirm" not in shown
