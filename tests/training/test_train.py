"""`entangle train`: TRL's own run, resumable to the bit, from one file of options to a folder that can be probed."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

import entangle.commands.train
from entangle.cli import main
from entangle.commands.probe import run_probe
from entangle.commands.train import TrainResult, last_checkpoint, run_train
from entangle.config import ModelOptions, ProbeConfig, TrainConfig, parse, read_yaml
from entangle.data import load_pairs
from entangle.errors import ConfigError, RunError, UserError
from entangle.models import load_policy
from entangle.runs.progress import Interrupted
from entangle.training.progress import ProgressCallback
from entangle.training.samples import hold_out, take_share, text_of
from tests.training import runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny policy, pairs, and completions."""
    folder = tmp_path_factory.mktemp("inputs")
    runs.tokenizer().save_pretrained(folder / "policy")
    runs.policy().save_pretrained(folder / "policy")
    rows = list(runs.pairs(20))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (folder / "sft.jsonl").write_text("\n".join(map(json.dumps, completions)))
    return folder


def config(inputs: Path, out: Path, **options: Any) -> TrainConfig:
    """Six float32 steps of 4 pairs with a fresh LoRA, a checkpoint every two."""
    defaults: dict[str, Any] = {
        "model_name_or_path": str(inputs / "policy"),
        "dataset_name": str(inputs / "pairs.jsonl"),
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ("q_proj", "v_proj"),
        "output_dir": str(out),
        "device": "cpu",
    }
    return TrainConfig(**defaults | options)


def adapter(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.model_path / "adapter_model.safetensors")


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The default run, probed every two steps."""
    return run_train(config(inputs, tmp_path_factory.mktemp("runs") / "whole", probe_every=2))


def test_dpo_is_a_hand_made_run_of_trl(inputs: Path, finished: TrainResult, tmp_path: Path) -> None:
    """Bit for bit the weights and losses of DPOTrainer with the same arguments; the callback changes nothing."""
    pairs = load_pairs(str(inputs / "pairs.jsonl"))
    kept, _ = hold_out(pairs, 0.1, 64)
    args = {"max_steps": 6, "learning_rate": 1e-2, "max_length": 1024}
    rows = runs.Dataset.from_list(
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in kept]
    )
    theirs = runs.trainer(
        tmp_path,
        DPOTrainer,
        args=args,
        train_dataset=rows,
        model=AutoModelForCausalLM.from_pretrained(inputs / "policy", dtype=torch.float32),
    )
    theirs.train()
    named = {n: p.detach() for n, p in theirs.model.named_parameters() if p.requires_grad}
    ours = adapter(finished)
    assert are_equal({n.replace(".default", ""): p for n, p in named.items()}, ours)
    assert finished.log["loss"].dropna().tolist() == runs.logged(theirs, "loss")


def test_what_is_to_be_known_of_the_data_is_said(inputs: Path, tmp_path: Path) -> None:
    """Prompts that are what both responses begin with, in the training and in the held-out data."""
    rows = [{"chosen": f"w1 w2 w{k} w3", "rejected": f"w1 w2 w{k} w4 w5"} for k in range(6, 12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = Console(file=io.StringIO(), width=1000)
    data = {"dataset_name": str(tmp_path / "rows.jsonl"), "eval_dataset_name": str(tmp_path / "rows.jsonl")}
    run_train(config(inputs, tmp_path / "run", max_steps=1, save_steps=0, **data), said)
    notes = said.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "Note: There is no column 'prompt'" in notes
    assert "Note: Held-out data: There is no column 'prompt'" in notes


def test_the_folder_says_what_happened(inputs: Path, finished: TrainResult) -> None:
    there = {path.name for path in finished.run.path.iterdir()}
    assert there >= {
        "config.yaml",
        "identity.json",
        "provenance.json",
        "loss.json",
        "log_history.json",
        "summary.json",
        "adapter",
        "held_out.parquet",
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
        "steps.parquet",
    }
    assert finished.run.read_json("loss.json") == {"name": "dpo", "beta": 0.1}
    assert finished.summary["steps"] == 6 and finished.summary["held_out"]["pairs"] == 2
    steps = pd.read_parquet(finished.run.path / "steps.parquet")
    assert sorted(steps["step"].unique()) == [0, 2, 4, 6]
    held = finished.held_out
    assert held is not None
    shares = finished.summary["held_out"]["regimes"]
    assert sum(shares["start"].values()) == pytest.approx(1) and sum(shares["end"].values()) == pytest.approx(
        1
    )
    last = steps[steps["step"] == 6].set_index("index").loc[held["index"]]
    assert held["logps_chosen_end"].tolist() == pytest.approx(last["logps_chosen"].tolist(), rel=1e-5)
    assert "2 held-out pairs" in finished.table()


def test_what_was_trained_can_be_probed(inputs: Path, finished: TrainResult, tmp_path: Path) -> None:
    """The adapter's folder is a policy; the reference is the base that training started from."""
    probed = run_probe(
        ProbeConfig(
            model_name_or_path=str(finished.model_path),
            dataset_name=str(inputs / "pairs.jsonl"),
            losses=("dpo",),
            output_dir=str(tmp_path / "probe"),
        )
    ).pairs.set_index("index")
    assert finished.held_out is not None
    held = finished.held_out.set_index("index")
    rows = probed.loc[held.index]
    assert rows["logps_chosen"].tolist() == pytest.approx(held["logps_chosen_end"].tolist(), rel=1e-5)
    assert rows["ref_logps_rejected"].tolist() == pytest.approx(held["logps_rejected"].tolist(), rel=1e-5)


def test_a_finished_run_is_not_repeated_and_another_one_is_not_mixed_in(
    inputs: Path, finished: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entangle.commands.train, "_make_trainer", None)  # would fail if it were called
    again = run_train(config(inputs, finished.run.path, probe_every=2))
    assert again.summary == finished.summary
    with pytest.raises(RunError, match="learning_rate"):
        run_train(config(inputs, finished.run.path, probe_every=2, learning_rate=2e-2))


def test_a_killed_run_goes_on_and_equals_an_unbroken_one(
    inputs: Path, finished: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL after step 5, the last checkpoint being step 4; a half-written one is passed over."""
    options = config(inputs, tmp_path / "run", probe_every=2)
    child = os.fork()
    if child == 0:
        ProgressCallback.on_step_end = lambda self, args, state, control, **_: (  # type: ignore[method-assign]
            os.kill(os.getpid(), signal.SIGKILL) if state.global_step == 5 else None
        )
        try:
            run_train(options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (tmp_path / "run" / "checkpoint-5").mkdir()
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"
    advance, seen = ProgressCallback.on_step_end, []
    monkeypatch.setattr(
        ProgressCallback,
        "on_step_end",
        lambda self, args, state, *rest, **more: (
            seen.append(state.global_step),
            advance(self, args, state, *rest, **more),
        )[1],
    )
    resumed = run_train(options)
    assert seen == [5, 6]
    assert are_equal(adapter(resumed), adapter(finished))
    columns = ["step", "loss"]
    assert resumed.log[columns].equals(finished.log[columns])
    steps = [pd.read_parquet(done.run.path / "steps.parquet") for done in (resumed, finished)]
    assert steps[0]["logps_chosen"].tolist() == pytest.approx(steps[1]["logps_chosen"].tolist(), rel=1e-6)


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(
    inputs: Path, finished: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = ProgressCallback.on_step_end

    def press(self: ProgressCallback, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, args, state, control, **rest)

    monkeypatch.setattr(ProgressCallback, "on_step_end", press)
    with pytest.raises(Interrupted, match="step 3 of 6.*entangle train --config"):
        run_train(config(inputs, tmp_path / "run", probe_every=2))
    monkeypatch.setattr(ProgressCallback, "on_step_end", advance)
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
    assert are_equal(adapter(run_train(config(inputs, tmp_path / "run", probe_every=2))), adapter(finished))


def test_every_weight_can_be_trained(inputs: Path, tmp_path: Path) -> None:
    """Full training against a frozen copy of the start: TRL's run with that copy as ref_model."""
    done = run_train(config(inputs, tmp_path / "full", use_peft=False, max_steps=3, save_steps=0))
    assert done.model_path.name == "model" and not list(done.run.path.glob("checkpoint-*"))
    kept, _ = hold_out(load_pairs(str(inputs / "pairs.jsonl")), 0.1, 64)
    rows = runs.Dataset.from_list(
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in kept]
    )
    theirs = runs.trainer(
        tmp_path,
        DPOTrainer,
        args={"max_steps": 3, "max_length": 1024},
        train_dataset=rows,
        peft_config=None,
        ref_model=runs.policy(),
    )
    theirs.train()
    trained = load_file(done.model_path / "model.safetensors")
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(trained[name], parameter), name


def test_an_adapter_goes_on_training_with_itself_as_reference(
    inputs: Path, finished: TrainResult, tmp_path: Path
) -> None:
    done = run_train(
        config(inputs, tmp_path / "more", model_name_or_path=str(finished.model_path), max_steps=2)
    )
    assert done.log["loss"].iloc[0] == pytest.approx(0.6931, abs=1e-4)
    assert finished.held_out is not None and done.held_out is not None
    start, end = done.held_out["logps_chosen"], finished.held_out["logps_chosen_end"]
    assert start.tolist() == pytest.approx(end.tolist(), rel=1e-5)
    assert not are_equal(adapter(done), adapter(finished))
    assert not (done.model_path / "ref").exists()


@pytest.mark.parametrize("data", ["pairs.jsonl", "sft.jsonl"])
def test_fine_tuning_on_pairs_or_completions(data: str, inputs: Path, tmp_path: Path) -> None:
    """Cross-entropy of the completions falls; only they are scored: the loss is their mean per token."""
    options = {
        "dataset_name": str(inputs / data),
        "stage": "sft",
        "eval_share": 0.0,
        "max_steps": 30,
        "save_steps": 0,
    }
    done = run_train(config(inputs, tmp_path / "sft", **options))
    losses = done.log["loss"].dropna()
    assert losses.iloc[-5:].mean() < losses.iloc[:5].mean() - 0.05
    assert done.summary["samples"] == 20 and done.summary["loss"] is None
    assert "cross-entropy" in done.table() and "No held-out pairs" in done.table()


def test_a_fine_tuning_before_makes_the_reference(inputs: Path, tmp_path: Path) -> None:
    """Half the samples' chosen responses first; then the loss starts at ln 2 and held-out pairs where SFT ended."""
    options = {"sft_share": 0.5, "sft_epochs": 4, "max_steps": 2, "eval_share": 0.2}
    done = run_train(config(inputs, tmp_path / "run", **options))
    phase = TrainResult.load(tmp_path / "run" / "sft")
    assert phase.summary["samples"] == 8 and phase.summary["steps"] == 8
    assert done.log["loss"].iloc[0] == pytest.approx(0.6931, abs=1e-4)
    assert phase.held_out is not None and done.held_out is not None
    assert list(done.held_out["index"]) == list(phase.held_out["index"])
    start, end = done.held_out["logps_chosen"], phase.held_out["logps_chosen_end"]
    assert start.tolist() == pytest.approx(end.tolist(), rel=1e-4)
    assert start.mean() > phase.held_out["logps_chosen"].mean()
    described = load_policy(ModelOptions(done.model_path)).description
    assert described["model_name_or_path"] == str(tmp_path / "run" / "sft" / "merged")


def test_the_ledger_of_pairs_that_are_trained_on(inputs: Path, tmp_path: Path) -> None:
    options = {"ledger": True, "probe_trained": 4, "max_steps": 4, "save_steps": 0}
    done = run_train(config(inputs, tmp_path / "run", **options))
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert ledger["index"].nunique() == 4 and ledger["in_batch"].any()
    assert (ledger["own"] != 0).tolist() == ledger["in_batch"].tolist()
    probed = pd.read_parquet(tmp_path / "run" / "steps.parquet")
    assert sorted(probed["step"].unique()) == [0, 4]  # without probe_every at the start and at the end
    assert "The chosen log-prob (4 pairs, on average)" in done.table(200)
    with pytest.raises(ConfigError, match="pairs to probe.*probe_trained"):
        run_train(config(inputs, tmp_path / "none", probe_every=1, eval_share=0.0))


@pytest.mark.parametrize("by", ["ches", "cosine", "gap", "edit_distance"])
def test_selected_pairs_are_trained_on(by: str, inputs: Path, tmp_path: Path) -> None:
    done = run_train(
        config(
            inputs, tmp_path / "run", mitigations=(f"select:by={by},share=0.5",), max_steps=1, save_steps=0
        )
    )
    table = pd.read_parquet(tmp_path / "run" / "selection.parquet")
    assert done.summary["samples"] == table["kept"].sum() == 9
    risk = table[by] * (-1 if by in ("gap", "edit_distance") else 1)
    assert risk[table["kept"]].max() <= risk[~table["kept"]].min()


def test_a_mitigation_runs_from_options_to_folder(inputs: Path, tmp_path: Path) -> None:
    options = {"mitigations": ("reward_calibration:norms=ema",), "loss": "simpo:beta=2.0", "max_steps": 2}
    done = run_train(config(inputs, tmp_path / "run", **options))
    assert "reward_calibration" in done.table()
    assert done.log["entangle/log_factor_chosen"].notna().sum() == 2
    assert done.run.read_json("loss.json")["beta"] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dop"}, "Unknown loss"),
        ({"mitigations": ("sequential",)}, "made for optim sgd"),
        ({"mitigations": ("hope",)}, "Unknown mitigation"),
        ({"mitigations": ("virtual_splitting:k=much",)}, "k: expected a number; got 'much'"),
        ({"report_to": ("carrier_pigeon",)}, "no tracker 'carrier_pigeon' is installed"),
        ({"mitigations": ("virtual_splitting",), "ledger": True}, "one backward pass"),
        ({"mitigations": ("set_band",), "ledger": True}, "own step apart"),
        ({"mitigations": ("drift_free",), "optim": "adafactor"}, "set_band and drift_free to either"),
        ({"trainer_options": ("no_such_option=1",)}, "no_such_option"),
        ({"trainer_options": ("seed=3",)}, "option of its own"),
        ({"trainer_options": ('loss_type=["ipo"]',)}, "belongs to the loss"),
        ({"lr_scheduler_type": "sideways"}, "sideways"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_train(config(inputs, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "sft", "mitigations": ("sequential",)}, "no preference loss"),
        ({"stage": "sft", "probe_trained": 3}, "no preference loss"),
        ({"reference": "none"}, "isn't for training"),
        ({"train_share": 0.0}, "train_share"),
        ({"max_steps": 0}, "Nothing to train"),
        ({"learning_rate": "fast"}, "expected a number; got 'fast'"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


def test_held_out_pairs_depend_on_texts_alone(inputs: Path) -> None:
    pairs = load_pairs(str(inputs / "pairs.jsonl"))
    kept, held = hold_out(pairs, 0.25, 64)
    assert (len(kept), len(held)) == (15, 5)
    shuffled = pairs[7:] + pairs[:7]
    assert {p.index for p in hold_out(shuffled, 0.25, 64)[1]} == {p.index for p in held}
    assert len(hold_out(pairs, 0.25, 2)[1]) == 2
    assert hold_out(pairs, 0.0, 64) == (pairs, [])
    doubled = hold_out(pairs + pairs, 0.25, 64)
    assert not {p.prompt_hash for p in doubled[0]} & {p.prompt_hash for p in doubled[1]}
    small = {p.index for p in take_share(pairs, 0.1, text_of)}
    assert len(small) == 2 and small < {p.index for p in take_share(pairs, 0.5, text_of)}
    assert len(take_share(pairs, 1.0, text_of)) == 20


def test_a_file_written_for_trl_is_a_run(inputs: Path, tmp_path: Path) -> None:
    """loss_type and beta become the loss, the trainer's other options go to the trainer, typos are refused."""
    file = tmp_path / "dpo.yaml"
    file.write_text(
        "model_name_or_path: x\nloss_type: [ipo]\nbeta: 0.2\nlearning_rate: 1e-4\nwarmup_ratio: 0.1\n"
        "adam_epsilon: 1e-6\ngradient_checkpointing_kwargs: {use_reentrant: false}\nlora_dropout: 0.1\nuse_peft: true\n"
    )
    found, ignored = parse(
        TrainConfig, ["--config", str(file), "--max_steps", "3", "--dataset_name", "y"], prog="x"
    )
    assert found.loss == {"name": "ipo_avg", "beta": 0.2} or found.loss["name"].startswith("ipo")
    assert (found.learning_rate, found.warmup_steps, found.max_steps) == (1e-4, 0.1, 3)
    assert found.options_of_trainer == {
        "adam_epsilon": 1e-6,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    assert ignored == ("lora_dropout is left out: TRL switches dropout off in preference training.",)
    file.write_text("loss_type: sigmoid\nlabel_smoothing: 0.1\n")
    assert read_yaml(file, TrainConfig).values["trainer_options"] == (
        "label_smoothing=0.1",
    )  # refused by the loss
    for text, message in (
        ("use_dora: true", "use_dora"),
        ("lerning_rate: 1", "unknown key 'lerning_rate'.*is learning_rate meant"),
        ("", "it holds nothing"),
        ("\x00", "isn't valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_yaml(file, TrainConfig)


def test_a_run_replays_from_its_own_file(inputs: Path, tmp_path: Path) -> None:
    options = config(
        inputs,
        tmp_path / "run",
        loss="dpop:penalty=5",
        mitigations=("token_masking:max_share=0.3",),
        max_steps=1,
        trainer_options=("adam_epsilon=1e-7",),
        save_steps=0,
        report_to="none",
    )
    run_train(options)
    replayed, ignored = parse(
        TrainConfig,
        ["--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", "elsewhere"],
        prog="x",
    )
    assert replayed.recorded == options.recorded and not ignored


def test_the_command(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model_name_or_path: {inputs / 'policy'}\ndataset_name: {inputs / 'pairs.jsonl'}\ndevice: cpu\n"
        "per_device_train_batch_size: 4\nmax_steps: 2\nlora_target_modules: [q_proj, v_proj]\n"
    )
    assert main(["train", str(file), "--loss", "ipo", "--output_dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "ipo: 2 steps on 18 samples" in printed and "held-out pairs" in printed
    assert (
        main(["train", str(file), "--mitigations", "sequential", "--output_dir", str(tmp_path / "no")]) == 2
    )
    assert "SGD" in capsys.readouterr().err
    assert PartialState().is_main_process
