"""The sweep over checkpoints of real training runs, LoRA and full, and the onset it reads from them."""

from __future__ import annotations

import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from entangle.analysis.curves import curve, onset, pair_onsets, with_changes
from entangle.analysis.geometry import SIDES
from entangle.cli import main
from entangle.commands.across import AcrossResult, run_across
from entangle.commands.sweep import run_sweep
from entangle.config import AcrossConfig, ModelOptions, ReportConfig, SweepConfig, parse
from entangle.data import tokenize_pair
from entangle.errors import ConfigError, RunError
from entangle.measure.across import KeptDirections
from entangle.measure.inputs import load_pairs_of
from entangle.models import load_policy
from entangle.report.command import run_report
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted
from entangle.scores import AutogradEngine
from entangle.scores.rows import RowBatch
from tests.training import runs

STEPS = (4, 8, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    runs.policy().save_pretrained(folder)
    runs.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(base: Path) -> str:
    runs.pairs(8).to_json(base / "pairs.jsonl")
    return str(base / "pairs.jsonl")


def trained(folder: Path, base: Path, **options) -> Path:
    """A run of the user's: twelve DPO steps from a saved model, with three checkpoints."""
    args = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4}
    model = AutoModelForCausalLM.from_pretrained(base)
    runs.trainer(folder, model=model, args=args, **options).train()
    return folder


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("lora"), base)


def config(run: Path, data: str, **options) -> SweepConfig:
    return SweepConfig(run=str(run), dataset_name=data, losses=("dpo", "simpo"), max_length=64, **options)


def plain(model: torch.nn.Module, data: str) -> np.ndarray:
    """Summed log-probs of the chosen responses, pair by pair, from plain logits."""
    tokenizer, found = runs.tokenizer(), []
    for pair in load_pairs_of(SweepConfig(dataset_name=data)):
        prompt = tokenizer(pair.prompt)["input_ids"]
        row = torch.tensor([tokenizer(f"{pair.prompt}{pair.chosen}<eos>")["input_ids"]])
        tokens = torch.log_softmax(model(row).logits[0, :-1].double(), -1).gather(1, row[0, 1:, None])
        found.append(float(tokens[len(prompt) - 1 :].detach().sum()))
    return np.array(found)


def test_lora_run_against_plain_forward_passes(lora: Path, base: Path, pairs: str):
    from peft import PeftModel

    result = run_sweep(config(lora, pairs))
    assert result.curve["step"].tolist() == list(STEPS)
    before = plain(AutoModelForCausalLM.from_pretrained(base), pairs)
    for step in STEPS:
        checkpoint = lora / f"checkpoint-{step}"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), checkpoint)
        change = plain(model, pairs) - before
        rows = result.steps[result.steps["step"] == step].sort_values("index")
        np.testing.assert_allclose(rows["moved_chosen"], change, atol=2e-5)
        point = result.curve.set_index("step").loc[step]
        np.testing.assert_allclose(point["moved_chosen"], change.mean(), atol=2e-5)
        np.testing.assert_allclose(
            point["moved_chosen_error"], change.std(ddof=1) / len(change) ** 0.5, rtol=1e-3
        )
    assert result.summary["start"] == "reference (the model without its adapter)"
    assert (lora / "sweep" / "sweep.png").stat().st_size > 10_000


def test_adamw_metric_by_hand(lora: Path, pairs: str):
    """c_P = <g_w, P g_l> with P = 1 / (sqrt(v / (1 - beta2^t)) + eps), from the checkpoint's own file and autograd."""
    result = run_sweep(config(lora, pairs))
    row = result.steps[result.steps["step"] == 8].iloc[0]
    policy = load_policy(ModelOptions(lora / "checkpoint-8"))
    state = torch.load(lora / "checkpoint-8" / "optimizer.pt", weights_only=True)
    assert len(state["param_groups"][0]["params"]) == len(policy.parameters)  # all in the order of the model
    pair = load_pairs_of(SweepConfig(dataset_name=pairs))[int(row["index"])]
    batch = policy.collate([tokenize_pair(policy.tokenizer, pair, 64)])
    own = list(policy.parameters.values())
    chosen, rejected = (
        torch.autograd.grad(row_logps_with_graph(policy.model, batch)[side], own) for side in (0, 1)
    )
    product = 0.0
    for number, (g, other) in enumerate(zip(chosen, rejected, strict=True)):
        root = (state["state"][number]["exp_avg_sq"] / (1 - 0.999**8)).sqrt()
        product += float((g * other / (root + 1e-8)).sum())
    np.testing.assert_allclose(row["inner_adamw"], product, rtol=1e-4)
    assert row["inner_adamw"] != row["inner"]
    assert result.curve["ideal_adamw"].notna().all()


def row_logps_with_graph(model: torch.nn.Module, batch: RowBatch) -> torch.Tensor:
    """Summed log-probs of the rows, differentiable."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    tokens = torch.log_softmax(logits, -1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    return (tokens * batch.scored).sum(1)


def test_the_set_as_one_pair_by_hand(lora: Path, pairs: str, tmp_path: Path):
    """Mean products of different pairs' scores at a checkpoint, from autograd; shown everywhere."""
    options = config(lora, pairs, metrics=("sgd",), output_dir=str(tmp_path / "sweep"))
    result = run_sweep(options)
    for _, row in result.curve.iterrows():
        policy = load_policy(ModelOptions(lora / f"checkpoint-{int(row['step'])}"))
        batch = policy.collate([tokenize_pair(policy.tokenizer, pair, 64) for pair in load_pairs_of(options)])
        gram = AutogradEngine(policy.model, policy.parameters).gram(batch)
        n = len(gram) // 2
        others = ~torch.eye(n, dtype=torch.bool)
        ww, wl, ll = (block[others].mean().item() for block in (gram[:n, :n], gram[:n, n:], gram[n:, n:]))
        expected = [np.nan] * 3  # unbiased means of squares may be negative: no direction in common
        if ww > 0 and ll > 0:
            cosine = wl / (ww * ll) ** 0.5
            expected = [max(0.0, wl / ww), ll / wl if wl > 0 else np.inf, np.clip(cosine, -1, 1)]
        found = row[["set_low", "set_high", "set_cosine"]].to_numpy(float)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        gain = ww - 2 * wl + ll
        np.testing.assert_allclose(
            row["set_drift"], (ww - ll) / (2 * gain) if gain > 0 else np.nan, rtol=1e-3
        )
        assert not row["set_drift"] < row["set_drift_low"] and not row["set_drift"] > row["set_drift_high"]
        assert (
            not row["set_cosine"] < row["set_cosine_low"] and not row["set_cosine"] > row["set_cosine_high"]
        )
    assert 0 < result.curve["set_cosine"].notna().sum() and (result.curve["set_rho"] == 1).all()
    assert result.curve["set_drift"].notna().any()
    assert "All pairs as one, by mean scores (dpo" in result.table() and "others on" not in result.table()
    run_report(ReportConfig(runs=(str(tmp_path / "sweep"),), output=str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "All pairs as one, by mean scores (dpo" in page and "others on" not in page


def test_what_the_pairs_do_to_each_other_is_measured_once(lora: Path, pairs: str, tmp_path: Path):
    options = config(lora, pairs, across=True, metrics=("sgd",), output_dir=str(tmp_path / "sweep"))
    result = run_sweep(options)
    for step, row in result.curve.set_index("step").iterrows():
        found = AcrossResult.load(tmp_path / "sweep" / f"checkpoint-{step}").summary["losses"]["dpo"]
        for side in SIDES:
            assert (
                row[f"set_{side}"]
                == found[side]["others"]
                == pytest.approx(found[side]["pull"] + found[side]["push"])
            )
            assert row[f"set_{side}_error"] == found[side]["others_error"] > 0
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "sweep").rglob("across.json")}
    again = run_sweep(options)
    assert len(times) == 3 and all(file.stat().st_mtime_ns == time for file, time in times.items())
    pd.testing.assert_frame_equal(again.curve, result.curve)
    assert "others on chosen" in again.table()
    run_report(ReportConfig(runs=(str(tmp_path / "sweep"),), output=str(tmp_path / "page.html")))
    assert "others on chosen" in (tmp_path / "page.html").read_text(encoding="utf-8")
    without = run_sweep(replace(options, across=False)).curve
    assert not {"set_chosen", "set_rejected"} & set(without) and "set_cosine" in without
    run_across(
        AcrossConfig(run=str(tmp_path / "sweep" / "checkpoint-8"), losses=("simpo",), limit=3, plots=False)
    )
    pd.testing.assert_frame_equal(run_sweep(options).curve, result.curve)  # measured again: that was of fewer


def test_interrupt_while_measuring_across_resumes_the_sweep(
    lora: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped between the two passes at the first checkpoint: the command named is the sweep's, and finishes it."""
    options = config(
        lora, pairs, across=True, metrics=("sgd",), plots=False, output_dir=str(tmp_path / "sweep")
    )
    expected = run_sweep(replace(options, output_dir=str(tmp_path / "whole"))).curve

    keep = KeptDirections.keep

    def press(sums: KeptDirections, shard: int, is_last: bool) -> None:
        keep(sums, shard, is_last)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(KeptDirections, "keep", press)
        with pytest.raises(Interrupted, match="at checkpoint 1 of 3.* entangle sweep"):
            run_sweep(options)
    assert (tmp_path / "sweep" / "checkpoint-4" / "across").is_dir()
    pd.testing.assert_frame_equal(run_sweep(options).curve, expected)
    assert not list((tmp_path / "sweep").rglob("checkpoint-*/across"))


def test_a_probe_that_could_not_measure_its_set_leaves_a_gap(lora: Path, pairs: str, tmp_path: Path):
    options = config(lora, pairs, metrics=("sgd",), plots=False, output_dir=str(tmp_path / "sweep"))
    whole = run_sweep(options)
    file = tmp_path / "sweep" / "checkpoint-8" / "summary.json"
    summary = json.loads(file.read_text())
    del summary["set"]
    file.write_text(json.dumps(summary))
    (file.parent / "checksums.json").unlink()
    result = run_sweep(options)
    assert result.curve["set_rho"].isna().tolist() == [False, True, False]
    same = result.curve["step"] != 8
    pd.testing.assert_frame_equal(result.curve[same], whole.curve[same])
    assert "All pairs as one" in result.table()


def test_a_loss_that_pushes_nothing_down_has_an_infinite_ratio(lora: Path, pairs: str, tmp_path: Path):
    options = config(lora, pairs, metrics=("sgd",), output_dir=str(tmp_path / "sweep"))
    result = run_sweep(replace(options, losses=("sft",)))
    assert np.isinf(result.curve["set_rho"]).all() and " inf " in result.table()


def test_full_run_needs_to_be_told_its_start(base: Path, pairs: str, tmp_path: Path):
    run = trained(tmp_path, base, ref_model=AutoModelForCausalLM.from_pretrained(base), peft_config=None)
    told = run_sweep(config(run, pairs, model_name_or_path=str(base), output_dir=str(tmp_path / "told")))
    untold = run_sweep(config(run, pairs, reference="self", plots=False))
    assert untold.summary["start"] == "checkpoint-4" and told.summary["start"] == "reference (model)"
    assert untold.curve["moved_chosen"].iloc[0] == 0 != told.curve["moved_chosen"].iloc[0]
    gained = told.curve["moved_chosen"] - told.curve["moved_chosen"].iloc[0]
    np.testing.assert_allclose(untold.curve["moved_chosen"], gained, atol=1e-5)


def test_finished_checkpoints_are_skipped_and_new_ones_found(
    lora: Path, base: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import shutil

    import entangle.commands.sweep

    run, probed = tmp_path / "run", []
    shutil.copytree(lora, run, ignore=shutil.ignore_patterns("checkpoint-12", "sweep"))
    original = entangle.commands.sweep.run_probe

    def stopped(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(entangle.commands.sweep, "run_probe", stopped)
    with pytest.raises(Interrupted, match="at checkpoint 1 of 2.* entangle sweep") as stop:
        run_sweep(config(run, pairs, plots=False))
    _, _, *words = shlex.split(str(stop.value).partition("with: ")[2])
    again, _ = parse(SweepConfig, words, prog="x")
    assert again.run_path == run / "sweep" and not RunFolder(run / "sweep").changed_options(again)
    monkeypatch.setattr(
        entangle.commands.sweep,
        "run_probe",
        lambda probe, console=None: (
            probed.append(Path(probe.model_name_or_path).name),
            original(probe, console),
        )[1],
    )
    assert run_sweep(config(run, pairs, plots=False)).curve["step"].tolist() == [4, 8]
    shutil.copytree(lora / "checkpoint-12", run / "checkpoint-12")
    resumed = run_sweep(config(run, pairs, plots=False))
    assert probed == ["checkpoint-4"] * 2 + ["checkpoint-8"] * 2 + ["checkpoint-12"] * 2
    whole = run_sweep(config(lora, pairs, plots=False, output_dir=str(tmp_path / "whole")))
    pd.testing.assert_frame_equal(resumed.steps, whole.steps)
    shutil.copy(run / "checkpoint-4" / "adapter_model.safetensors", run / "checkpoint-8")  # other weights now
    with pytest.raises(RunError, match="adapter"):
        run_sweep(config(run, pairs, plots=False))


def test_reference_is_the_adapter_that_training_began_with(base: Path, pairs: str, tmp_path: Path):
    """TRL keeps a frozen copy, `ref`, of an adapter that it is given; its base alone isn't the start."""
    from peft import PeftModel

    first = trained(tmp_path / "first", base) / "checkpoint-12"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, is_trainable=True)
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-6}
    runs.trainer(tmp_path / "second", model=model, peft_config=None, args=args).train()
    result = run_sweep(config(tmp_path / "second", pairs, plots=False))
    assert result.summary["start"] == "reference (model)"
    assert result.curve["moved_chosen"].abs().max() < 0.01  # against the base it would be far more


def test_errors(tmp_path: Path, pairs: str, capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", str(tmp_path), "--dataset_name", pairs]) == 2
    assert "checkpoint-*" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="optimizer_state"):
        SweepConfig(run=".", optimizer_state="x")


def test_the_runs_own_file_will_do(lora: Path, base: Path, pairs: str, tmp_path: Path):
    """A YAML file as `trl dpo` reads it: training-only keys, use_peft, and the run's folder as output_dir."""
    content = {
        "model_name_or_path": str(base),
        "dataset_name": pairs,
        "output_dir": str(lora),
        "use_peft": True,
        "lora_r": 4,
        "loss_type": ["sigmoid"],
        "beta": 0.1,
        "learning_rate": 1e-2,
        "max_length": 64,
    }
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(content))
    read, ignored = parse(SweepConfig, ["--config", str(tmp_path / "dpo.yaml")], prog="x")
    assert read.run_path == lora / "sweep" and "learning_rate" in " ".join(ignored)
    probe = read.probe_of(lora / "checkpoint-4")
    assert (probe.model_name_or_path, probe.adapter_name_or_path) == (str(base), str(lora / "checkpoint-4"))
    assert not probe.use_peft and probe.losses == ({"name": "dpo", "beta": 0.1},)


def steps_of(chosen: list[list[float]], rejected: list[list[float]]) -> pd.DataFrame:
    """Rows from changes per step (outer) and pair (inner)."""
    rows = [
        {"step": 10 * (s + 1), "index": i, "logps_chosen": w - 5, "logps_rejected": v - 7}
        for s, (ws, vs) in enumerate(zip(chosen, rejected, strict=True))
        for i, (w, v) in enumerate(zip(ws, vs, strict=True))
    ]
    start = pd.DataFrame({"index": [0, 1], "logps_chosen": -5.0, "logps_rejected": -7.0})
    return with_changes(pd.DataFrame(rows), start)


def test_onset_is_the_first_step_of_the_lasting_fall():
    """By hand: both means fall at 10 (a dip), the chosen is back at 20, and from 30 on both are down for good."""
    dip, back, down = [-1.0, -1.1], [1.0, 1.1], [-2.0, -2.2]
    rows = steps_of([dip, back, down, down], [dip, down, down, down])
    assert onset(curve(rows)) == 30
    assert pair_onsets(rows).tolist() == [30, 30]
    assert onset(curve(steps_of([dip, back], [dip, dip]))) is None


def test_onset_wants_more_than_noise():
    """Two pairs that fell by 3 and rose by 1: mean -1, standard error 2."""
    rows = steps_of([[-3.0, 1.0]], [[-3.0, -3.1]])
    point = curve(rows).iloc[0]
    assert (point["moved_chosen"], point["moved_chosen_error"]) == (-1.0, 2.0)
    assert onset(curve(rows)) is None
    onsets = pair_onsets(rows)
    assert onsets[0] == 10 and np.isnan(onsets[1])
    assert point["both_fell"] == 0.5 and point["accuracy"] == 0.5
