"""Entanglement across pairs: against the whole Gram matrix, a real step on all pairs, as a command, and broken off."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from entangle.analysis.across import PARTS, Across, set_block
from entangle.analysis.geometry import SIDES
from entangle.analysis.regimes import Regime
from entangle.cli import main
from entangle.commands.across import AcrossResult, run_across
from entangle.commands.probe import run_probe
from entangle.config import AcrossConfig, ProbeConfig, parse
from entangle.data import load_pairs, tokenize_pair
from entangle.measure.across import KeptDirections
from entangle.measure.inputs import load_policy_of
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted
from entangle.scores import FactoredEngine, HeldScores, make_engine, row_logps, score_gram
from entangle.scores.float64 import KeepFloat64
from tests.probing import write_rows
from tests.processes import ENVIRONMENT, run_on_two, torchrun
from tests.tiny import gpt2_tokenizer, save_adapter, save_policy

PAIRS = [
    {"prompt": "TL;DR:", "chosen": " the cat sat on the mat", "rejected": " the other cat sat on the mat"},
    {"prompt": "TL;DR: they said", "chosen": " the sum is four", "rejected": " the sum is five"},
    {"prompt": "the cat sat " * 40, "chosen": " the cat", "rejected": " they"},  # longer than max_length
    {"prompt": "the cat sat", "chosen": " on the mat", "rejected": " they think"},
    {"prompt": "she said", "chosen": " they think", "rejected": " they think the other thing"},
]
SCORED = (0, 1, 3, 4)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ProbeConfig:
    """A finished probe of four pairs and one that can't be scored; incentives differ between the pairs."""
    folder = tmp_path_factory.mktemp("across")
    base = save_policy(folder / "base", gpt2_tokenizer())
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    config = ProbeConfig(
        model_name_or_path=base,
        adapter_name_or_path=save_adapter(folder / "adapter", base),
        dtype="float64",
        dataset_name=str(folder / "rows.jsonl"),
        losses=("dpo", "cpo"),
        max_length=64,
        output_dir=str(folder / "run"),
    )
    run_probe(config, Console(quiet=True))
    return config


@pytest.fixture(scope="module")
def result(options: ProbeConfig) -> AcrossResult:
    return measure(options)


def measure(options: ProbeConfig, **asked) -> AcrossResult:
    return run_across(AcrossConfig(run=str(options.output_dir), plots=False, **asked), Console(quiet=True))


def whole_gram(options: ProbeConfig) -> np.ndarray:
    """All products of all scored pairs' scores: chosen rows, then rejected rows."""
    policy = load_policy_of(options)
    pairs = [
        tokenize_pair(policy.tokenizer, pair, options.max_length) for pair in load_pairs(options.dataset_name)
    ]
    batch = policy.collate([pairs[i] for i in SCORED])
    return score_gram(make_engine(policy.model, policy.parameters), [batch]).numpy()


def test_parts_are_sums_over_the_gram_matrix(options, result):
    gram, n = whole_gram(options), len(SCORED)
    for loss in ("dpo", "cpo"):
        rows = result.rows[result.rows["loss"] == loss].set_index("index")
        assert tuple(rows.index) == SCORED
        own = result.probe.predictions.query("loss == @loss").set_index("index").loc[list(SCORED)]
        d_w, d_l = own["incentive_chosen"].to_numpy(), own["incentive_rejected"].to_numpy()
        for k, side in enumerate(SIDES):
            by_chosen, by_rejected = gram[k * n : (k + 1) * n, :n] * d_w, -gram[k * n : (k + 1) * n, n:] * d_l
            itself = np.diag(by_chosen), np.diag(by_rejected)
            others = [
                (m.sum(1) - own) / (n - 1) for m, own in zip((by_chosen, by_rejected), itself, strict=True)
            ]
            found = {part: rows[f"{part}_{side}"].to_numpy() for part in PARTS}
            np.testing.assert_allclose(found["pull"], others[0], rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(found["push"], others[1], rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(found["own"], itself[k], rtol=1e-8)
            np.testing.assert_allclose(found["partner"], itself[1 - k], rtol=1e-8, atol=1e-9)
            mean = result.summary["losses"][loss][side]
            assert mean["change"] == pytest.approx((by_chosen + by_rejected).sum(1).mean(), rel=1e-8)
            assert mean["change"] == pytest.approx(sum(mean[part] for part in PARTS), rel=1e-8)


@pytest.mark.parametrize("loss", ["dpo", "cpo"])
def test_a_real_step_on_all_pairs_confirms_it(options, result, loss):
    """An epoch of one batch: change = lr / N times the sum of the parts, to first order."""
    policy = load_policy_of(options)
    pairs = [
        tokenize_pair(policy.tokenizer, pair, options.max_length) for pair in load_pairs(options.dataset_name)
    ]
    batch = policy.collate([pairs[i] for i in SCORED])
    n, rate = len(SCORED), 1e-6
    with KeepFloat64():
        before = row_logps(policy.model, batch)
    own = result.probe.predictions.query("loss == @loss").set_index("index").loc[list(SCORED)]
    push = np.concatenate([own["incentive_chosen"], -own["incentive_rejected"]]) / n
    scores = make_engine(policy.model, policy.parameters, "autograd").scores(batch)
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter += rate * (torch.from_numpy(push).to(parameter) @ scores[name]).view_as(parameter)
    with KeepFloat64():
        moved = (row_logps(policy.model, batch) - before).view(2, n) * n / rate
    rows = result.rows[result.rows["loss"] == loss]
    for k, side in enumerate(SIDES):
        np.testing.assert_allclose(moved[k].numpy(), rows[f"epoch_{side}"], rtol=2e-4)
        signs = np.sign(rows[f"epoch_{side}"].to_numpy())
        up = rows["epoch_regime"].isin(
            [Regime.IDEAL, Regime.BOTH_UP] if side == "chosen" else [Regime.BOTH_UP, Regime.INVERTED]
        )
        np.testing.assert_array_equal(signs > 0, up)


def test_a_longer_epoch_has_more_others(options, result):
    longer = measure(options, epoch_pairs=101, losses=("cpo",))
    assert list(longer.summary["losses"]) == ["cpo"]
    short, long = (each.summary["losses"]["cpo"]["chosen"] for each in (result, longer))
    assert long["own"] == pytest.approx(short["own"]) and long["pull"] == pytest.approx(
        100 / 3 * short["pull"]
    )


def test_fewer_pairs_are_spread_over_the_run(options):
    assert measure(options, limit=2).rows["index"].unique().tolist() == [0, 4]


def test_the_set_is_estimated_without_bias_and_its_errors_are_the_jackknifes():
    """U-statistics over i != j; leaving out one pair at a time gives their standard errors."""
    torch.manual_seed(1)
    n, chosen, rejected = 60, torch.randn(60, 5).double() + 0.4, torch.randn(60, 5).double() + 0.5

    def block(keep: torch.Tensor) -> dict:
        up, down = chosen[keep], rejected[keep]
        own = torch.stack([(up * up).sum(1), (up * down).sum(1), (down * down).sum(1)])
        rows = torch.stack([up, down], 1)
        return set_block(own, rows @ torch.stack([up.mean(0), down.mean(0)], 1))

    found, everyone = block(torch.arange(n)), torch.arange(n)
    apart = ~torch.eye(n, dtype=torch.bool)
    for name, products in (
        ("sq_chosen", chosen @ chosen.T),
        ("inner", chosen @ rejected.T),
        ("sq_rejected", rejected @ rejected.T),
    ):
        assert found[name] == pytest.approx(float(products[apart].mean()))
        left_out = np.array([block(everyone[everyone != i])[name] for i in range(n)])
        jackknife = ((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
        assert found[f"{name}_error"] == pytest.approx(jackknife, rel=0.05)
    assert found["band"] == pytest.approx(
        [found["inner"] / found["sq_chosen"], found["sq_rejected"] / found["inner"]]
    )


@pytest.mark.parametrize("side", SIDES)
def test_errors_of_a_loss_are_the_jackknifes(side: str):
    """What the others do, and the whole change, under incentives that differ between the pairs."""
    torch.manual_seed(2)
    n, scores = 60, torch.randn(60, 2, 5).double() + torch.tensor([[0.4], [0.5]]).double()
    incentives = torch.rand(2, n).double() + 0.5

    def summary(keep: torch.Tensor) -> dict:
        rows, (d_w, d_l) = scores[keep], incentives[:, keep]
        block = torch.stack([(rows[:, a] * rows[:, b]).sum(1) for a, b in ((0, 0), (0, 1), (1, 1))])
        moved = torch.stack([(d_w[:, None] * rows[:, 0]).mean(0), (d_l[:, None] * rows[:, 1]).mean(0)], 1)
        return Across("dpo", d_w, d_l, block, rows @ moved, rows @ rows.mean(0).T, 40).summary()[side]

    everyone = torch.arange(n)
    found, left_out = summary(everyone), [summary(everyone[everyone != i]) for i in range(n)]
    for name, error in (("others", "others_error"), ("change", "error")):
        values = np.array([each[name] for each in left_out])
        jackknife = ((n - 1) / n * ((values - values.mean()) ** 2).sum()) ** 0.5
        assert found[error] == pytest.approx(jackknife, rel=0.05)
    assert found["others"] == pytest.approx(found["pull"] + found["push"])


def test_a_set_without_a_common_direction_has_no_band():
    own = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).double()
    block = set_block(own, torch.zeros(2, 2, 2).double())
    assert block["sq_chosen"] < 0 and np.isnan(block["band"]).all() and np.isnan(block["cosine"])


def test_command_writes_and_says_what_it_found(options, capsys):
    run = Path(str(options.output_dir))
    assert main(["across", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "Under dpo an epoch's first-order effect" in shown and "cpo" in shown
    assert (run / "across.parquet").is_file() and (run / "across.png").stat().st_size > 10_000
    assert json.loads((run / "across.json").read_text())["pairs"] == len(SCORED)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected the run folder of a finished probe"),
        (("RUN", "--losses", "simpo"), "simpo isn't among the losses"),
        (("RUN", "--limit", "1"), "limit must be at least 2; got 1"),
        (("nowhere",), "nowhere"),
    ],
)
def test_refusals(options, capsys, arguments, said):
    words = [str(options.output_dir) if word == "RUN" else word for word in arguments]
    try:
        status = main(["across", *words])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert said in " ".join(capsys.readouterr().err.split())


# --- broken off, resumed, and shared --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ProbeConfig:
    """A probe of eight pairs in four shards."""
    folder = tmp_path_factory.mktemp("shards")
    base = save_policy(folder / "base", gpt2_tokenizer())
    config = ProbeConfig(
        model_name_or_path=base,
        adapter_name_or_path=save_adapter(folder / "adapter", base),
        dtype="float64",
        dataset_name=write_rows(folder / "rows.jsonl", 8),
        losses=("dpo", "cpo"),
        max_length=64,
        shard_size=2,
        output_dir=str(folder / "run"),
    )
    run_probe(config, Console(quiet=True))
    return config


@pytest.fixture
def copied(finished: ProbeConfig, tmp_path: Path) -> ProbeConfig:
    """A copy of that run, to measure across."""
    shutil.copytree(str(finished.output_dir), tmp_path / "copy")
    return replace(finished, output_dir=str(tmp_path / "copy"))


def kept(options: ProbeConfig) -> Path:
    return Path(str(options.output_dir)) / "across"


def assert_same(found: AcrossResult, expected: AcrossResult) -> None:
    pd.testing.assert_frame_equal(found.rows, expected.rows, check_exact=True)
    assert found.summary == expected.summary


class Killed(BaseException):
    """What nothing catches."""


def killed_at(shard: int, act: Callable[..., None], place: int) -> Callable[..., None]:
    """`act`, which has the number of a shard as its argument at `place`, until it would be done for this shard."""

    def stopping(*arguments: object) -> None:
        if arguments[place] == shard:
            raise Killed
        act(*arguments)

    return stopping


@pytest.mark.parametrize("at_a_time", [100, 4])
@pytest.mark.parametrize("phase", ["sums", "products"])
def test_a_resumed_measurement_equals_an_unbroken_one(
    copied: ProbeConfig, monkeypatch: pytest.MonkeyPatch, phase: str, at_a_time: int
):
    """Broken off at the third shard, of either pass: the first two aren't computed again. Directions fit, or don't."""
    monkeypatch.setattr("entangle.measure.across.directions_at_a_time", lambda engine: at_a_time)
    unbroken = measure(copied)
    assert not kept(copied).exists()
    counted = count_passes(monkeypatch)
    with monkeypatch.context() as patch:
        if phase == "sums":
            patch.setattr(KeptDirections, "keep", killed_at(2, KeptDirections.keep, 1))
        else:
            patch.setattr(RunFolder, "write_shard", killed_at(2, RunFolder.write_shard, 2))
        with pytest.raises(Killed):
            measure(copied)
    assert len(counted) == (3 if phase == "sums" else 4)
    counted.clear()
    assert_same(measure(copied), unbroken)
    assert len(counted) == (4 if phase == "sums" else 2 if at_a_time == 100 else 4)
    assert not kept(copied).exists()


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every pass of the engine from here on."""
    counted, scores = [], FactoredEngine.scores

    def counting(engine, batch):
        counted.append(len(batch.input_ids))
        return scores(engine, batch)

    monkeypatch.setattr(FactoredEngine, "scores", counting)
    return counted


@pytest.mark.parametrize(("memory", "passes"), [(2**31, 4), (0, 8)])
def test_scores_that_fit_memory_are_computed_once(copied, monkeypatch, memory, passes):
    unbroken = measure(copied)
    monkeypatch.setattr("entangle.measure.across.HeldScores", partial(HeldScores, memory=memory))
    counted = count_passes(monkeypatch)
    assert_same(measure(copied), unbroken)
    assert len(counted) == passes and set(counted) == {4}


def test_sums_that_take_long_to_save_are_saved_seldom_and_summed_again(copied, monkeypatch):
    """Killed with one shard saved of two that were summed: as if the second one had never been."""
    unbroken, saves = measure(copied), []
    monkeypatch.setattr("entangle.runs.pace.Pace.is_due", property(lambda pace: not saves))
    monkeypatch.setattr("entangle.measure.across.save_file", lambda *a: (saves.append(1), save_file(*a)))
    with monkeypatch.context() as patch:
        patch.setattr(KeptDirections, "keep", killed_at(2, KeptDirections.keep, 1))
        with pytest.raises(Killed):
            measure(copied)
    assert KeptDirections(kept(copied) / "sums-000", {}, 1).kept == {0}
    counted = count_passes(monkeypatch)
    assert_same(measure(copied), unbroken)
    assert len(counted) == 4 and len(saves) == 2  # the last shard's sums are always saved


@pytest.mark.parametrize("phase", ["sums", "products"])
def test_interrupt_finishes_the_shard_and_says_how_to_resume(copied, monkeypatch, phase):
    unbroken = measure(copied)
    owner, name = (FactoredEngine, "scores") if phase == "sums" else (RunFolder, "write_shard")
    act, calls = getattr(owner, name), []

    def press(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return act(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, press)
        with pytest.raises(Interrupted, match="2 of 4 shards are in .*across. Resume with: entangle") as stop:
            measure(copied, losses=("dpo", "cpo"))
    _, verb, *words = shlex.split(str(stop.value).partition("with: ")[2])
    again, _ = parse(AcrossConfig, words, prog="x")
    assert verb == "across" and again.run_path == kept(copied) and again.losses == ("dpo", "cpo")
    counted = count_passes(monkeypatch)
    assert_same(run_across(replace(again, plots=False), Console(quiet=True)), unbroken)
    assert len(counted) == (4 if phase == "sums" else 2)


def break_off(options: ProbeConfig, monkeypatch: pytest.MonkeyPatch, **asked: object) -> None:
    """At the third shard of the second pass."""
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_shard", killed_at(2, RunFolder.write_shard, 2))
        with pytest.raises(Killed):
            measure(options, **asked)


@pytest.mark.parametrize(
    "changed", [{"losses": ("cpo",)}, {"limit": 7}, {"batch_size": 1}, {"epoch_pairs": 99}]
)
def test_other_options_begin_anew(copied, monkeypatch, changed):
    expected = measure(copied, **changed)
    break_off(copied, monkeypatch)
    counted = count_passes(monkeypatch)
    assert_same(measure(copied, **changed), expected)
    assert sum(counted) == 2 * changed.get("limit", 8)


def test_a_measurement_of_another_probe_begins_anew(copied, monkeypatch):
    """The run was made again, with other incentives, in the same folder."""
    break_off(copied, monkeypatch)
    work = shutil.move(kept(copied), Path(str(copied.output_dir)).parent / "work")
    other = replace(copied, losses=("dpo:beta=0.3", "cpo:beta=0.3"), overwrite=True)
    run_probe(other, Console(quiet=True))
    expected = measure(other)
    shutil.move(work, kept(copied))
    assert_same(measure(other), expected)


def test_what_a_kill_leaves_before_the_options_are_recorded_is_no_hindrance(copied):
    expected = measure(copied)
    kept(copied).mkdir()
    (kept(copied) / "identity.json").write_text("{}")
    (kept(copied) / ".config.yaml.17.tmp").write_text("loss")
    assert_same(measure(copied), expected)


def test_an_illegible_record_begins_anew(copied, monkeypatch):
    expected = measure(copied)
    break_off(copied, monkeypatch)
    (kept(copied) / "identity.json").write_text("{")
    assert_same(measure(copied), expected)


@pytest.fixture(scope="module")
def many(finished: ProbeConfig, tmp_path_factory: pytest.TempPathFactory) -> ProbeConfig:
    """A probe of forty pairs in as many shards, and across them too."""
    folder = tmp_path_factory.mktemp("many")
    data = write_rows(folder / "rows.jsonl", 40, seed=3)
    config = replace(finished, dataset_name=data, shard_size=1, batch_size=1, output_dir=str(folder / "run"))
    run_probe(config, Console(quiet=True))
    return config


def assert_close(found: AcrossResult, expected: AcrossResult) -> None:
    """Of sums in another order, in float64."""
    pd.testing.assert_frame_equal(found.rows, expected.rows, rtol=1e-9, atol=1e-9)
    for name in ("sq_chosen", "inner", "sq_rejected"):
        assert found.summary["set"][name] == pytest.approx(expected.summary["set"][name], rel=1e-9)


@pytest.mark.slow
def test_a_measurement_killed_at_random_moments_equals_an_unbroken_one(many: ProbeConfig):
    """SIGKILL, at moments drawn over both passes."""
    unbroken, draw, run = measure(many, batch_size=1), random.Random(11), str(many.output_dir)
    words = [sys.executable, "-m", "entangle", "across", run, "--batch_size", "1", "--no-plots"]
    seen = []
    for phase, goal in (("sums", 9), ("products", 5), ("products", 20)):
        process = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        deadline = time.monotonic() + 120
        while progress(many)[phase] < goal and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.005)
        process.kill()
        process.wait()
        seen.append(progress(many))
    assert [each["products"] >= goal for each, goal in zip(seen, (0, 5, 20), strict=True)] == [True] * 3
    assert kept(many).exists() and not all(each["products"] == 40 for each in seen)
    assert_same(measure(many, batch_size=1), unbroken)
    assert not kept(many).exists()


def progress(options: ProbeConfig) -> dict[str, int]:
    """Shards that are there of either pass."""
    sums = KeptDirections(kept(options) / "sums-000", {}, 999).kept
    return {"sums": len(sums), "products": len(RunFolder(kept(options)).shards_of("products-000"))}


@pytest.mark.slow
def test_two_processes_share_the_pairs_and_equal_one(many: ProbeConfig):
    one = measure(many)
    printed = run_on_two("entangle", "across", str(many.output_dir), "--no-plots")
    assert printed.count("Under dpo an epoch's first-order effect") == 1
    assert_close(AcrossResult.load(str(many.output_dir)), one)
    assert not kept(many).exists()


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sums", "products"])
def test_what_two_processes_leave_one_process_finishes(many: ProbeConfig, phase: str):
    """SIGKILL to a rank: `torchrun` stops the other one, and both their sums and products are used."""
    one = measure(many, batch_size=1)
    words = ["entangle", "across", str(many.output_dir), "--batch_size", "1", "--no-plots"]
    launched = subprocess.Popen(
        torchrun(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while progress(many)[phase] < 6 and time.monotonic() < deadline:
        time.sleep(0.001)
    ranks = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert launched.wait(timeout=120) != 0
    there = progress(many)
    assert there[phase] >= 6 and there["products"] < 40
    assert_close(measure(many, batch_size=1), one)
