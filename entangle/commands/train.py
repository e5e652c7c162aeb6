"""Preference training and supervised fine-tuning by TRL, into a run folder that can be resumed.

config.yaml, provenance.json, summary.json   as of every command
checkpoint-*/      TRL's checkpoints; a killed run goes on from the last one
adapter/, model/   what was trained: `entangle probe --model_name_or_path RUN/adapter`
loss.json          the loss, as `losses.build` reads it
log_history.json   every row of the trainer's log
held_out.parquet  log-probs of each held-out pair at the start and at the end
steps/, set/, ...  what the callback saw, where it was asked to
sft/               the run of the fine-tuning before, with its merged model
selection.parquet  what pairs were selected by, and which were kept
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from rich.console import Console, Group, RenderableType
from rich.text import Text
from torch import nn
from transformers import PrinterCallback
from trl import DPOConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from entangle.analysis.ledger import describe_change
from entangle.analysis.mitigations import (
    Mitigation,
    Select,
    Splitting,
    Steering,
    build_mitigation,
    select_pairs,
)
from entangle.config import DataOptions, TrainConfig, build_losses
from entangle.data import PreferencePair, TokenizedPair, collate, hash_pairs
from entangle.data.sources import read_rows
from entangle.diagnostics import compute
from entangle.errors import ConfigError
from entangle.measure.inputs import own_device, read_pairs_of
from entangle.measure.plan import is_scorable
from entangle.models import Policy, load_policy
from entangle.models.origin import find_origin
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted, progress_bar
from entangle.runs.provenance import environment, hash_texts
from entangle.runs.session import Session
from entangle.scores import Engine, make_engine, row_logps
from entangle.tables.base import Shown
from entangle.tables.train import train_table
from entangle.training import PreferenceTrainer
from entangle.training.arguments import trainer_arguments
from entangle.training.callback import EntanglementCallback
from entangle.training.mitigated import MitigatedTrainer, check_mitigations
from entangle.training.progress import ProgressCallback
from entangle.training.samples import (
    chosen_rows,
    completion_rows,
    hold_out,
    preference_dataset,
    take_share,
    text_of,
)
from entangle.training.trainer import check_options

PASS = 8
"""Pairs of a forward pass outside of training."""


@dataclass(frozen=True)
class TrainResult(Shown):
    """A finished training run.

    Args:
        run: its folder.
        log: the trainer's log, a row per logged step.
        held_out: log-probs of each held-out pair at the start and at the end; None without such pairs.
        summary: what the run came to.
    """

    run: RunFolder
    log: pd.DataFrame
    held_out: pd.DataFrame | None
    summary: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> TrainResult:
        """Read a finished run folder.

        Raises:
            RunError: there is none at `path`.
        """
        run = RunFolder.open(path, TrainConfig.VERB)
        log = pd.DataFrame(run.read_json("log_history.json")["log_history"])
        return cls(run, log, run.table("held_out.parquet"), run.read_json("summary.json"))

    @property
    def model_path(self) -> Path:
        """The folder of what was trained: an adapter, or a whole model."""
        return self.run.path / self.summary["trained"]

    def renderable(self) -> RenderableType:
        """The table as a rich object, and in a sentence each why the log-probs moved, where a ledger was kept."""
        table = train_table(self.summary, self.log, self.run.table("set.parquet"))
        ledger = self.run.table("ledger.parquet")
        if ledger is None:
            return table
        return Group(table, *(Text(describe_change(ledger, side)) for side in ("chosen", "rejected")))


@dataclass(frozen=True)
class Samples:
    """What a run reads.

    Args:
        pairs: pairs to train on; empty where the data has completions.
        completions: rows of prompt and completion, in the stage sft.
        held: held-out pairs.
        notes: what is to be known of the data.
    """

    pairs: list[PreferencePair]
    completions: list[dict[str, Any]]
    held: list[PreferencePair]
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, str]:
        """Hashes of the data."""
        trained = hash_pairs(self.pairs) if self.pairs else hash_texts(map(json.dumps, self.completions))
        return {"data": trained, "held_out": hash_pairs(self.held)}


def run_train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Train a policy: from options to a finished run folder.

    Laws: with the loss `dpo` and no mitigation the weights are those of TRL's own DPOTrainer with the same options,
    bit for bit; a run that was killed and resumed ends with the weights of an unbroken one.

    The reference is the policy as training starts (or `ref_model_name_or_path`). A finished run isn't repeated; one
    that was broken off goes on from its last checkpoint. Works under `accelerate launch` and `torchrun`.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: an option, the data, the model or the run folder can't be used.
        Interrupted: Ctrl-C; a checkpoint is saved first.
    """
    session = Session.start(config, console, on_cpu=config.device == "cpu")
    run, console, processes = session.run, session.console, session.processes
    check_training(config)
    samples = _load_samples(config)
    policy = _load_policy(config, processes)
    if not session.begin(dict(policy.identity) | samples.identity):
        return TrainResult.load(run.path)
    for note in samples.notes:
        session.note(note)
    if config.sft_share:
        policy = _fine_tuned(config, run, console, processes)
    rule = next((item for item in _mitigations(config) if isinstance(item, Select)), None)
    if rule is not None:
        samples = replace(
            samples, pairs=_select(run, samples.pairs, policy, rule, config, console, processes)
        )
    held = _scorable(samples.held, policy, config.max_length)
    _measure(run, "held_out_start.parquet", policy.model, policy.pad_id, held, processes)
    trainer = _make_trainer(config, run, policy, samples)
    _attach_callback(trainer, config, run, held)
    resumed = last_checkpoint(run.path)
    if resumed is not None:
        console.print(f"Resuming {run.path} from {resumed.name}.", markup=False)
    with ProgressCallback(console) as progress:
        trainer.add_callback(progress)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if progress.is_stopped:
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; a checkpoint is in "
            f"{run.path}. Resume with: {run.resume_command}"
        )
    trained = _save(trainer, run, policy, processes)
    _measure(run, "held_out_end.parquet", trainer.model, policy.pad_id, held, processes)
    return TrainResult.load(session.finish(lambda: _close(session, config, policy, trainer, trained)))


def check_training(config: TrainConfig) -> None:
    """Refuse what can't be trained before anything is loaded.

    Raises:
        UserError: an option, a loss or a mitigation isn't known, or they don't go together.
    """
    arguments = trainer_arguments(config, config.run_path)
    if isinstance(arguments, DPOConfig):
        (loss,) = build_losses([config.loss])
        check_options(arguments, loss)
        changing = check_mitigations(_mitigations(config), loss, arguments)
        if isinstance(changing, Splitting) and (config.live or config.ledger):
            raise ConfigError(
                f"live and ledger read one backward pass per batch, and {changing.name} takes its step from several. "
                "Drop them; probe_every works."
            )
        if isinstance(changing, Steering) and config.ledger:
            raise ConfigError(
                f"ledger takes the optimiser's own step apart, and {changing.name} corrects it. Drop ledger; "
                "probe_every and live work."
            )


def _mitigations(config: TrainConfig) -> list[Mitigation]:
    return [build_mitigation(spec) for spec in config.mitigations]


# --- inputs -------------------------------------------------------------------------------------------------


def _load_samples(config: TrainConfig) -> Samples:
    """The pairs (or completions) that are trained on, and the pairs that are held out."""
    held: list[PreferencePair] = []
    notes: tuple[str, ...] = ()
    if config.eval_dataset_name is not None and config.eval_limit != 0:
        evaluated = read_pairs_of(
            DataOptions(
                dataset_name=config.eval_dataset_name,
                dataset_train_split=config.eval_dataset_split,
                columns=config.columns,
                limit=config.eval_limit,
            )
        )
        held, notes = evaluated.pairs, tuple(f"Held-out data: {note}" for note in evaluated.notes)
    if config.stage == "sft" and (rows := _completions(config)):
        return Samples(
            [], take_share(rows, config.train_share, lambda row: json.dumps(row, default=str)), held, notes
        )
    data = read_pairs_of(config)
    pairs, notes = data.pairs, (*data.notes, *notes)
    if config.eval_dataset_name is None:
        pairs, held = hold_out(pairs, config.eval_share, config.eval_limit)
    pairs = take_share(pairs, config.train_share, text_of)
    return Samples(pairs, chosen_rows(pairs) if config.stage == "sft" else [], held, notes)


def _completions(config: TrainConfig) -> list[dict[str, Any]]:
    """Rows of prompt and completion, if that's what the data set holds."""
    if config.dataset_name == DataOptions.dataset_name:
        return []
    rows = read_rows(config.dataset_name, config.dataset_train_split, config.dataset_config)
    column = config.column_map.get("completion", "completion")
    if not len(rows) or column not in rows[0]:
        return []
    count = len(rows) if config.limit is None else min(config.limit, len(rows))
    return completion_rows([rows[i] for i in range(count)], config.column_map)


def _load_policy(config: TrainConfig, processes: PartialState) -> Policy:
    """The policy as training starts: with a fresh LoRA, with the adapter that it brings, or whole."""
    whole = config.adapter_name_or_path is None and not config.use_peft
    start = (replace(config, parameters="full") if whole else config).located
    origin = find_origin(start.model_name_or_path, start.model_revision, start.adapter_name_or_path)
    options = replace(
        start,
        use_peft=start.use_peft and origin.adapter is None,
        parameters=config.parameters,
        # where this training starts, whatever an earlier one has saved
        reference="model" if config.ref_model_name_or_path else "self",
    )
    return load_policy(options, seed=config.seed, device=own_device(processes))


def _scorable(pairs: Sequence[PreferencePair], policy: Policy, max_length: int) -> list[TokenizedPair]:
    return [done for done in policy.tokenize(pairs, max_length).tokens if is_scorable(done)]


# --- the trainer --------------------------------------------------------------------------------------------


def _make_trainer(config: TrainConfig, run: RunFolder, policy: Policy, samples: Samples) -> Any:
    """TRL's trainer for the stage. It puts the fresh LoRA on itself (the same weights: the same seed)."""
    arguments = trainer_arguments(config, run.path)
    model, lora = policy.model, None
    if (
        config.use_peft
        and isinstance(model, PeftModel)
        and policy.description["adapter_name_or_path"] is None
    ):
        lora = model.peft_config["default"]
        assert isinstance(lora, LoraConfig)
        model = model.unload()
    options: dict[str, Any] = {
        "args": arguments,
        "processing_class": policy.tokenizer,
        "peft_config": lora,
        "eval_dataset": preference_dataset(samples.held) if samples.held and _evaluates(arguments) else None,
    }
    if config.stage == "sft":
        trainer = SFTTrainer(model=model, train_dataset=Dataset.from_list(samples.completions), **options)
    else:
        (loss,) = build_losses([config.loss])
        changing = check_mitigations(_mitigations(config), loss, arguments)
        options |= {"loss": loss, "train_dataset": preference_dataset(samples.pairs)}
        reference = _reference(config, policy, model, loss.needs_reference)
        if changing is None:
            trainer = PreferenceTrainer(model, reference, **options)
        else:
            trainer = MitigatedTrainer(model, reference, mitigation=changing, **options)
        run.write_json("loss.json", loss.config)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _attach_callback(trainer: Any, config: TrainConfig, run: RunFolder, held: list[TokenizedPair]) -> None:
    """Probe pairs, read the batches, keep the ledger: whatever the options ask for."""
    is_probed = bool(config.probe_every or config.ledger)
    if not (is_probed or config.live):
        return
    pairs = config.probe_trained or held
    if is_probed and not pairs:
        raise ConfigError(
            "probe_every and ledger need pairs to probe, and none is held out (eval_share, eval_limit, "
            "eval_dataset_name). Hold some back, or give probe_trained."
        )
    EntanglementCallback(
        pairs if is_probed else None,
        every=config.probe_every or sys.maxsize,
        live=config.live,
        ledger=config.ledger,
        loss="sft" if config.stage == "sft" else None,
        output_dir=run.path,
    ).attach(trainer)


def _evaluates(arguments: Any) -> bool:
    return arguments.eval_strategy != "no"


def _reference(config: TrainConfig, policy: Policy, model: nn.Module, is_needed: bool) -> nn.Module | None:
    """A frozen reference model where TRL makes none: a second model, or a copy of a policy without adapter."""
    if config.ref_model_name_or_path is not None:
        return policy.reference.model  # pyright: ignore[reportAttributeAccessIssue]
    if not is_needed or isinstance(policy.model, PeftModel) or config.precompute_ref_log_probs:
        return None
    return copy.deepcopy(model).requires_grad_(False)  # before the trainer changes the model's forward


def _fine_tuned(config: TrainConfig, run: RunFolder, console: Console, processes: PartialState) -> Policy:
    """The policy after a fine-tuning on a share of the chosen responses, with a fresh LoRA if one is asked for.

    What the fine-tuning trained is merged into the weights, so the reference is the fine-tuned model.
    """
    phase = replace(
        config,
        stage="sft",
        train_share=config.sft_share,
        sft_share=0.0,
        mitigations=(),
        probe_every=0,
        probe_trained=0,
        live=False,
        ledger=False,
        max_steps=-1,
        num_train_epochs=config.sft_epochs,
        trainer_options=(),
        learning_rate=config.sft_learning_rate or config.learning_rate,
        output_dir=str(run.path / "sft"),
        ref_model_name_or_path=None,
        reference="auto",
        overwrite=False,
    )
    try:
        folder = run_train(phase, console).model_path
    except Interrupted as stop:
        raise Interrupted(f"Stopped in the fine-tuning before. Resume with: {run.resume_command}") from stop
    if folder.name == "adapter":
        merged = folder.with_name("merged")
        if processes.is_main_process and not merged.is_dir():
            policy = _load_policy(replace(phase, model_name_or_path=str(folder)), processes)
            assert isinstance(policy.model, PeftModel)
            unfinished = folder.with_name(".merged")
            policy.model.merge_and_unload().save_pretrained(unfinished)
            policy.tokenizer.save_pretrained(unfinished)
            unfinished.rename(merged)
        processes.wait_for_everyone()
        folder = merged
    return _load_policy(replace(config, model_name_or_path=str(folder), adapter_name_or_path=None), processes)


def _select(
    run: RunFolder,
    pairs: list[PreferencePair],
    policy: Policy,
    rule: Select,
    config: TrainConfig,
    console: Console,
    processes: PartialState,
) -> list[PreferencePair]:
    """The pairs that the rule keeps under the policy as training starts."""
    if processes.is_main_process and run.table("selection.parquet") is None:
        tokenized = _scorable(pairs, policy, config.max_length)
        engine = make_engine(policy.model, policy.parameters) if rule.by in ("cosine", "gap") else None
        rows: list[dict[str, Any]] = []
        with progress_bar(console, "pairs to select from", len(tokenized), 0) as advance:
            for start in range(0, len(tokenized), PASS):
                batch = tokenized[start : start + PASS]
                values = _risks(rule.by, policy, engine, batch)
                rows += [{"index": p.index, rule.by: v} for p, v in zip(batch, values, strict=True)]
                advance(len(batch))
        table = pd.DataFrame(rows)
        run.write_table("selection.parquet", table.assign(kept=select_pairs(table, rule)))
    processes.wait_for_everyone()
    table = run.table("selection.parquet")
    assert table is not None
    kept = set(table.loc[table["kept"], "index"])
    if not kept:
        raise ConfigError(
            f"select keeps none of {len(pairs)} pairs; {rule.by} is {table[rule.by].describe().to_dict()}."
        )
    console.print(f"Selected {len(kept)} of {len(pairs)} pairs by {rule.by}.", markup=False)
    return [pair for pair in pairs if pair.index in kept]


def _risks(by: str, policy: Policy, engine: Engine | None, batch: Sequence[TokenizedPair]) -> list[float]:
    """The number that pairs are selected by."""
    rows = policy.collate(batch)
    if engine is None:
        return compute([by], policy, rows)[by].tolist()
    geometry = engine.pairs(rows).geometry
    if by == "cosine":
        return geometry.cosine.tolist()
    gaps = geometry.gap_chosen / geometry.sq_chosen, geometry.gap_rejected / geometry.sq_rejected
    return torch.minimum(*gaps).tolist()


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end (its trainer_state.json is written last)."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            found.append(
                (json.loads((checkpoint / "trainer_state.json").read_text())["global_step"], checkpoint)
            )
        except (OSError, ValueError, KeyError):
            continue
    return max(found, default=(0, None))[1]


# --- outputs ------------------------------------------------------------------------------------------------


def _measure(
    run: RunFolder,
    name: str,
    model: nn.Module,
    pad_id: int,
    pairs: Sequence[TokenizedPair],
    processes: PartialState,
) -> None:
    """Log-probs of the held-out pairs, a row each, unless the file is there already."""
    if not pairs or not processes.is_main_process or (run.path / name).is_file():
        return
    rows: list[dict[str, Any]] = []
    for start in range(0, len(pairs), PASS):
        batch = pairs[start : start + PASS]
        logps = row_logps(model, collate(batch, pad_id)).cpu()
        for pair, chosen, rejected in zip(batch, *logps.chunk(2), strict=True):
            rows.append(
                {
                    "index": pair.index,
                    "prompt_hash": pair.prompt_hash,
                    "length_chosen": len(pair.chosen_ids),
                    "length_rejected": len(pair.rejected_ids),
                    "logps_chosen": float(chosen),
                    "logps_rejected": float(rejected),
                }
            )
    run.write_table(name, pd.DataFrame(rows))


def _save(trainer: Any, run: RunFolder, policy: Policy, processes: PartialState) -> str:
    """Write what was trained as safetensors; its folder's name."""
    is_adapter = isinstance(trainer.model, PeftModel)
    name = "adapter" if is_adapter else "model"
    folder = str(run.path / name)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(folder)  # gathers the shards
    elif processes.is_main_process:
        trainer.model.save_pretrained(folder, **({"selected_adapters": ["default"]} if is_adapter else {}))
        policy.tokenizer.save_pretrained(folder)
    return name


def _close(session: Session, config: TrainConfig, policy: Policy, trainer: Any, trained: str) -> None:
    """Join the measurements and write what closes a run, its summary last."""
    run, seconds = session.run, session.seconds
    history = trainer.state.log_history
    run.write_json("log_history.json", {"log_history": history})
    held = None
    if (start := run.table("held_out_start.parquet")) is not None:
        end = run.table("held_out_end.parquet")
        assert end is not None and list(end["index"]) == list(start["index"])
        held = start.assign(logps_chosen_end=end["logps_chosen"], logps_rejected_end=end["logps_rejected"])
        run.write_table("held_out.parquet", held)
        for name in ("held_out_start.parquet", "held_out_end.parquet"):
            (run.path / name).unlink()
    run.write_json("provenance.json", environment() | dict(policy.description) | {"seconds": seconds})
    loss = getattr(trainer, "loss", None)
    run.write_json(
        "summary.json",
        {
            "stage": config.stage,
            "loss": None if loss is None else loss.label,
            "mitigations": config.mitigations,
            "trained": trained,
            "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "samples": len(trainer.train_dataset),
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "train_loss": next((row["train_loss"] for row in reversed(history) if "train_loss" in row), None),
            "seconds": seconds,
            "held_out": None if held is None else summarise_held_out(held) | _regimes(run),
        },
    )


def _regimes(run: RunFolder) -> dict[str, Any]:
    """Shares of the probed pairs by regime under the loss itself, at the first and at the last probe."""
    steps = run.table("steps.parquet")
    if steps is None or "regime" not in steps:
        return {}
    at = {"start": steps["step"].min(), "end": steps["step"].max()}
    shares = {
        when: steps.loc[steps["step"] == step, "regime"].value_counts(normalize=True)
        for when, step in at.items()
    }
    return {"regimes": {when: {str(k): float(v) for k, v in share.items()} for when, share in shares.items()}}


def summarise_held_out(rows: pd.DataFrame) -> dict[str, Any]:
    """Means over the held-out pairs, nats: log-probs at start and end, their changes, and who moved how."""
    chosen = rows["logps_chosen_end"] - rows["logps_chosen"]
    rejected = rows["logps_rejected_end"] - rows["logps_rejected"]
    return {
        "pairs": len(rows),
        "chosen": {"start": rows["logps_chosen"].mean(), "end": rows["logps_chosen_end"].mean()},
        "rejected": {"start": rows["logps_rejected"].mean(), "end": rows["logps_rejected_end"].mean()},
        "margin_change": float((chosen - rejected).mean()),
        "accuracy": float((chosen > rejected).mean()),
        "chosen_fell": float((chosen < 0).mean()),
        "both_fell": float(((chosen < 0) & (rejected < 0)).mean()),
    }
