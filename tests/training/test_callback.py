"""The callback changes no bit of a run, its rows are right, and they survive a kill."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from trl import DPOTrainer

from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.analysis.regimes import predict
from entangle.data import PreferencePair, load_pairs
from entangle.errors import RunError
from entangle.models import AdapterOff
from entangle.runs.shards import StepShards
from entangle.scores import row_logps
from entangle.scores.autograd import AutogradEngine
from entangle.training import EntanglementCallback, TrainingError
from entangle.training.callback import trained_loss
from entangle.training.training_set import training_pairs
from losses import DPO, IPO, PairLogps, build
from tests.processes import run_on_two
from tests.training import runs
from tests.training.callback_runs import are_same_run, train, weights

HELD_OUT = [
    PreferencePair(prompt="w1 w2 w3", chosen=" w4 w5", rejected=" w6 w7 w8", index=100),
    PreferencePair(prompt="w9 w2", chosen=" w4 w5 w11 w12", rejected=" w4 w6", index=101),
]


def everything(**options: Any) -> EntanglementCallback:
    return EntanglementCallback(5, **{"every": 2, "live": True, "ledger": True} | options)


def test_the_probe_set_may_be_given_in_any_form(tmp_path: Path) -> None:
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in HELD_OUT]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_pairs(rows)
    forms = (pairs, rows, tmp_path / "rows.jsonl", Dataset.from_list(rows))
    assert all(EntanglementCallback(form).pairs == pairs for form in forms)
    assert EntanglementCallback(3).pairs == 3 and EntanglementCallback(live=True).pairs is None
    with pytest.raises(TrainingError, match="something to watch"):
        EntanglementCallback([])


def dropping_out() -> dict[str, Any]:
    """Attention dropout, which TRL's `disable_dropout` doesn't reach: training draws random numbers."""
    model = runs.policy()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return {"model": model}


SETTINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "fp32": ({}, dict),
    "bf16": ({"bf16": True}, dict),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}, dict),
    "checkpointing": ({"gradient_checkpointing": True}, dict),
    "reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        dict,
    ),
    "dropout": ({}, dropping_out),
    "dropout_bf16_checkpointing": ({"bf16": True, "gradient_checkpointing": True}, dropping_out),
    "evaluation": ({"eval_strategy": "steps", "eval_steps": 2}, lambda: {"eval_dataset": runs.pairs(4)}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_bit_identical(setting: str, tmp_path: Path) -> None:
    args, options = SETTINGS[setting]
    plain = train(tmp_path / "plain", args=args, **options())
    recorded = train(tmp_path / "recorded", everything(), args=args, **options())
    assert are_same_run(plain, recorded)
    folder = tmp_path / "recorded" / "entangle"
    tables = ("steps", "live", "ledger", "set", "batches")
    assert all(len(pd.read_parquet(folder / f"{kind}.parquet")) for kind in tables)
    assert not any(
        m._forward_hooks for n, m in recorded.model.named_modules() if n.endswith("lora_A.default")
    )


def test_the_comparison_tells_runs_apart(tmp_path: Path) -> None:
    plain = train(tmp_path / "a", args={"max_steps": 1})
    other = train(tmp_path / "b", args={"max_steps": 1, "learning_rate": 0.99e-2})
    assert not are_same_run(plain, other)


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[DPOTrainer, Path]:
    """A run with a probe set of held-out pairs."""
    folder = tmp_path_factory.mktemp("probed")
    torch.manual_seed(0)
    callback = EntanglementCallback(HELD_OUT, every=4, output_dir=folder / "rows")
    return train(folder, callback, args={"bf16": True}), folder / "rows"


def test_rows_are_those_of_the_model(probed: tuple[DPOTrainer, Path]) -> None:
    """The last rows against plain autograd on the trained model; reference and regime against their definitions."""
    done, folder = probed
    rows = pd.read_parquet(folder / "steps.parquet")
    assert rows["step"].tolist() == [0, 0, 4, 4, 6, 6] and rows["index"].tolist() == [100, 101] * 3
    callback = next(c for c in done.callback_handler.callbacks if isinstance(c, EntanglementCallback))
    last = rows[rows["step"] == 6]
    del done.model.forward  # accelerate's autocast, which the callback too goes around
    probe = callback._probe_set(done.args, done.model, done.processing_class, done.get_train_dataloader())
    ((pairs, batch),) = probe.passes()
    oracle = AutogradEngine(done.model, probe.policy.parameters).pairs(batch)
    scale = (oracle.geometry.sq_chosen * oracle.geometry.sq_rejected).sqrt()
    order = [pair.index - 100 for pair in pairs]
    for name in GEOMETRY_COLUMNS:
        found = torch.tensor(last[name].to_numpy())[order]
        assert torch.allclose(
            (found - getattr(oracle.geometry, name)) / scale, torch.zeros(2).double(), atol=1e-5
        )
    logps, reference = row_logps(done.model, batch), AdapterOff(done.model).logps(batch)
    for k, side in enumerate(("chosen", "rejected")):
        mine = torch.tensor(last[f"logps_{side}"].to_numpy())[order]
        assert torch.allclose(mine, logps.chunk(2)[k], atol=1e-4)
        assert rows.groupby("index")[f"ref_logps_{side}"].nunique().tolist() == [1, 1]
        assert torch.allclose(
            torch.tensor(last[f"ref_logps_{side}"].to_numpy())[order], reference.chunk(2)[k], atol=1e-4
        )
        per_token = last[f"logps_{side}"] / last[f"length_{side}"]
        assert last[f"logps_per_token_{side}"].tolist() == pytest.approx(per_token.tolist())
    lengths = batch.lengths.chunk(2)
    pairs = PairLogps(*logps.chunk(2), *lengths, *reference.chunk(2))
    expected = predict(oracle.geometry, DPO().incentives(pairs))
    assert [last["regime"].tolist()[i] for i in order] == [str(regime) for regime in expected.regimes]
    assert torch.allclose(
        torch.tensor(last["change_chosen"].to_numpy())[order], expected.change_chosen, rtol=1e-3
    )


def test_metrics_land_in_the_log(probed: tuple[DPOTrainer, Path]) -> None:
    done, folder = probed
    logged = [row for row in done.state.log_history if "entangle/probe/cosine" in row]
    assert [row["step"] for row in logged] == [0, 4, 6]
    rows = StepShards(folder, "steps").read(4)
    assert logged[1]["entangle/probe/logps_chosen"] == pytest.approx(rows["logps_chosen"].mean())
    assert logged[1]["entangle/probe/ideal"] == (rows["regime"] == "ideal").mean()
    assert sum(logged[1][f"entangle/probe/{r}"] for r in ("ideal", "both_up", "both_down", "inverted")) == 1


def test_metrics_reach_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(tmp_path, everything(), args={"report_to": "tensorboard", "max_steps": 2})
    (file,) = (tmp_path / "board").rglob("events.*")
    events = accumulator.EventAccumulator(str(file)).Reload()
    for tag in ("probe/cosine", "live/cosine", "ledger/chosen/partner"):
        name = next(name for name in events.Tags()["scalars"] if name.endswith(f"entangle/{tag}"))
        assert events.Scalars(name)[-1].step == 2


def test_it_alerts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A loss that lowers both responses lowers both, so every probe is over the limit."""
    caplog.set_level(logging.WARNING)
    monkey = logging.getLogger("transformers")
    monkey.addHandler(caplog.handler)
    train(tmp_path, EntanglementCallback(4, every=1, loss="apo_down"), args={"max_steps": 3})
    monkey.removeHandler(caplog.handler)
    assert caplog.text.count("Both log-probs fall") == 1


class Crash(TrainerCallback):
    """A run that dies in its fifth step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_rows_survive_a_kill_and_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    args = {"save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path / "whole", everything(), args=args)
    broken = runs.trainer(tmp_path / "broken", args=args | {"max_steps": 6, "logging_steps": 2})
    everything().attach(broken)
    broken.add_callback(Crash())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    rows = StepShards(tmp_path / "broken" / "entangle", "steps").rows()
    assert rows["step"].unique().tolist() == [0, 2, 4]
    resumed = runs.trainer(tmp_path / "broken", args=args | {"max_steps": 6, "logging_steps": 2})
    everything().attach(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    for kind in ("steps", "live", "ledger", "set"):
        there, here = (
            pd.read_parquet(tmp_path / name / "entangle" / f"{kind}.parquet") for name in ("whole", "broken")
        )
        pd.testing.assert_frame_equal(there, here, rtol=1e-4, atol=1e-5)
    train(tmp_path / "broken", everything(), args={"max_steps": 2})  # a new run in the old place
    assert pd.read_parquet(tmp_path / "broken" / "entangle" / "live.parquet")["step"].max() == 2


def test_no_rows_yet_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="found none"):
        StepShards(tmp_path, "steps").rows()


def test_sharded_runs_are_pointed_to_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is accelerate's own; only what it says about the kind of run is changed."""
    monkeypatch.setattr("entangle.training.callback.AcceleratorState", lambda: sharded)
    sharded = AcceleratorState()
    sharded.__dict__ = dict(sharded.__dict__)
    sharded.distributed_type = DistributedType.FSDP
    said: list[str] = []
    monkeypatch.setattr("entangle.training.callback.logger.warning", said.append)
    plain = train(tmp_path / "plain", args={"max_steps": 1})
    recorded = train(tmp_path / "recorded", everything(), args={"max_steps": 1})
    assert are_same_run(plain, recorded)
    assert len(said) == 1 and "entangle sweep" in said[0]
    assert not (tmp_path / "recorded" / "entangle").exists()


def test_any_trainer_with_a_stated_loss(tmp_path: Path) -> None:
    """A bare transformers trainer with a preference collator, a model without adapter, and no attach."""
    template = runs.trainer(tmp_path, args={"max_steps": 1})

    class Simple(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            logps, _ = runs.plain_logps(model, inputs)
            chosen, rejected = logps.chunk(2)
            return -(chosen - rejected).mean()

    def simple() -> Simple:
        args = template.args
        args.remove_unused_columns = False
        return Simple(
            model=runs.policy(),
            args=args,
            train_dataset=template.train_dataset,
            data_collator=template.data_collator,
            processing_class=runs.tokenizer(),
        )

    plain, recorded = simple(), simple()
    recorded.add_callback(EntanglementCallback(HELD_OUT, loss="slic", output_dir=tmp_path / "rows"))
    plain.train()
    recorded.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(recorded), strict=True))
    rows = StepShards(tmp_path / "rows", "steps").rows()
    assert rows["step"].tolist() == [0, 0, 1, 1] and rows["regime"].notna().all()
    assert rows["ref_logps_chosen"].isna().all()
    unstated = simple()
    EntanglementCallback(HELD_OUT).attach(unstated)
    with pytest.raises(TrainingError, match="Give EntanglementCallback"):
        unstated.train()
    live = simple()
    EntanglementCallback(live=True, loss="slic").attach(live)
    with pytest.raises(TrainingError, match="returns none"):
        live.train()
    lonely = simple()
    lonely.add_callback(EntanglementCallback(live=True, loss="slic"))
    with pytest.raises(TrainingError, match="attach"):
        lonely.train()


def test_the_trained_loss_is_read_off_the_trainer(tmp_path: Path) -> None:
    def of(**args: Any) -> Any:
        return trained_loss(runs.trainer(tmp_path, DPOTrainer, args=args))

    assert of(beta=0.3) == DPO(beta=0.3)
    assert of(loss_type=["ipo"], beta=0.2).trl == "ipo"
    assert trained_loss(runs.trainer(tmp_path, loss=IPO())) == IPO()
    both = of(loss_type=["sigmoid", "bco_pair"], loss_weights=[1.0, 0.5])
    assert both.name == "weighted_sum" and both.losses[0] == DPO()
    with pytest.raises(TrainingError, match="label_smoothing=0.1"):
        of(label_smoothing=0.1)


def test_older_trainers_losses_are_told_or_refused(tmp_path: Path) -> None:
    """Before 0.29 TRL had more options, and LLaMA-Factory's DPOTrainer has arguments without any loss."""

    @dataclass
    class Older:
        loss_type: str = "sigmoid"
        beta: float = 0.1
        rpo_alpha: float | None = None
        reference_free: bool = False

    done = runs.trainer(tmp_path, DPOTrainer)
    done.args = Older(beta=0.3)
    assert trained_loss(done) == DPO(beta=0.3)
    for options, said in (
        ({"rpo_alpha": 1.0}, "rpo_alpha=1.0"),
        ({"reference_free": True}, "reference_free=True"),
    ):
        done.args = Older(**options)
        with pytest.raises(TrainingError, match=said):
            trained_loss(done)
    done.args = SimpleNamespace()
    with pytest.raises(TrainingError, match="no loss_type and beta"):
        trained_loss(done)


def test_what_reads_log_probs_refuses_a_trl_that_returns_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trl.__version__", "1.9.0")
    with pytest.raises(TrainingError, match="here is TRL 1.9.0"):
        train(tmp_path, EntanglementCallback(4, live=True))
    train(tmp_path, EntanglementCallback(4))


def test_pairs_of_the_training_set_are_what_is_trained_on(tmp_path: Path) -> None:
    done = runs.trainer(tmp_path, args={"max_length": 7})
    pairs = training_pairs(done.train_dataset, 4, 7)
    count = len(done.train_dataset)  # TRL drops pairs whose prompt fills max_length
    assert [pair.index for pair in pairs] == [0, count // 4, count // 2, 3 * count // 4]
    batch = runs.collated(done, [pair.index for pair in pairs])
    for i, pair in enumerate(pairs):
        for row, response in ((i, pair.chosen_ids), (4 + i, pair.rejected_ids)):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            assert ids == pair.prompt_ids + response
            assert batch["completion_mask"][row].sum() == len(response)


def test_what_makes_no_sense_is_refused() -> None:
    for options in ({}, {"pairs": 0}, {"live": True, "ledger": True}):
        with pytest.raises(TrainingError, match="something to watch"):
            EntanglementCallback(**options)
    with pytest.raises(ValueError, match="nonsense"):
        EntanglementCallback(3, loss="nonsense")
    assert EntanglementCallback(3, loss="ipo").loss == build("ipo")


@pytest.mark.slow
def test_two_processes_are_bit_identical_and_share_the_work(tmp_path: Path) -> None:
    """DDP on gloo: equal weights with and without; the rows are those of one process with the same batches."""
    run_on_two("tests.training.ddp_callback_run", str(tmp_path))
    digests = json.loads((tmp_path / "answer.json").read_text())
    assert len(digests) == 4 and len(set(digests)) == 1
    train(
        tmp_path / "single",
        everything(),
        args={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    for kind, keys in (
        ("steps", ["step", "index"]),
        ("ledger", ["step", "index", "side"]),
        ("live", ["step", "pair"]),
        ("set", ["step", "metric"]),
    ):
        there, here = (
            pd.read_parquet(tmp_path / name / "entangle" / f"{kind}.parquet").sort_values(
                keys, ignore_index=True
            )
            for name in ("single", "double")
        )
        columns = [name for name in there if name not in ("micro_batch", "row")]
        pd.testing.assert_frame_equal(there[columns], here[columns], rtol=2e-2, atol=2e-3)
