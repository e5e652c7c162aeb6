"""A callback that watches entanglement while a model is trained, and doesn't change the training by one bit."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, Self, cast

import pandas as pd
import trl
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from packaging.version import Version
from transformers import Trainer, TrainerCallback
from transformers.utils import logging
from trl import DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from entangle.analysis.cross_batch import WINDOW
from entangle.analysis.mitigations import Steering
from entangle.analysis.regimes import Regime
from entangle.analysis.set_verdict import ALERTS, FALL, UNKNOWN, UNSURE, finding, live_verdict, set_alert
from entangle.config.foreign import losses_of_trl, names_in_trl
from entangle.data import Pairs, PreferencePair, TokenizedPair, load_pairs
from entangle.runs.shards import StepShards
from entangle.training.accounting import LedgerRecorder
from entangle.training.live import BatchRecorder
from entangle.training.memory import BatchMemory, batch_memory
from entangle.training.optimizer_steps import innermost, metric_of
from entangle.training.probing import Probed, ProbeSet
from entangle.training.rows import (
    StepRows,
    batch_metrics,
    batch_row,
    ledger_metrics,
    live_metrics,
    live_rows,
    probe_metrics,
    set_metrics,
    set_rows,
)
from entangle.training.trainer import LOSS_OPTIONS, TrainingError
from entangle.training.training_set import training_pairs
from losses import PreferenceLoss, build

logger = logging.get_logger(__name__)

FUSED_HEAD = "1.16"
"""The TRL from which on a trainer's model returns log-probs instead of logits; live=True reads those."""

OLD_OPTIONS = ("rpo_alpha", "reference_free")
"""Options of TRL before 0.29 that change its loss."""


class EntanglementCallback(TrainerCallback):
    """Probes a fixed set of pairs, reads the training batch's own geometry, and keeps the ledger of a run.

    Law: the training is bit-identical to one without the callback.

        callback = EntanglementCallback(pairs, every=50, live=True).attach(trainer)
        trainer.train()

    Three things, together or apart, for TRL's DPOTrainer, PreferenceTrainer and (the first one) any trainer of
    transformers. Rows are written as the run goes, in pieces (`StepShards`): a killed run keeps them, a resumed one
    goes on. At the end each table is joined into one file.

    - **Probe set** (`pairs`; `steps.parquet`): before the first step, every `every` steps and after the last one,
      each pair's geometry, log-probs and, under the trained loss, incentives, predicted changes and regime. The
      numbers are those of the stored weights in eval mode: no dropout, no autocast. Logged as `entangle/probe/*`.
      From the same pass the set of these pairs as one (`entangle.analysis.sets`), which on real data decides which way
      the mean log-probs go: cosine, band and drift under the loss's present incentives, in the plain metric and under
      Adam's preconditioner as the run holds it (`set.parquet`). Logged as `entangle/set/*`.
    - **Live** (`live.parquet`): at every step the geometry of the very batch, read off the step's own backward pass
      (`BatchRecorder`); incentives carry the mean over the batch and its accumulation. Logged as `entangle/live/*`.
      And what the optimiser's memory of earlier batches does to this one, from which the drift of fresh pairs follows
      without any probe (`batches.parquet`, `entangle.analysis.cross_batch`). Logged as `entangle/set/live_*`. The
      memory is of one epoch and isn't in checkpoints: a resumed run gathers it anew. It is left out above 134 million
      trained parameters.
    - **Ledger** (`ledger.parquet`): at every step the change of each probed pair's log-probs, split by its causes
      (`entangle.analysis.ledger`). It costs a forward and backward and a forward over the probe set per accounted step.
      Logged as `entangle/ledger/*`, nats since the last row of the log.

    Under several processes (DDP) the pairs are shared out. Where parameters are sharded (FSDP, DeepSpeed ZeRO-3) the
    callback says so once and measures nothing: probe the checkpoints with `entangle sweep`.

    Args:
        pairs: the probe set, as `entangle.data.pairs_of` takes it (a path, a `datasets.Dataset`, a list of dicts, or
            pairs), or tokenised pairs; an integer n: n pairs of the run's own training set, evenly spread; None: no
            probe set.
        every: optimiser steps between two probes.
        live: whether to read the batches' geometry. Needs layers with rules throughout, as LoRA has.
        ledger: whether to keep the ledger of the probe set. Needs torch's AdamW, Adam or SGD.
        ledger_every: account for one step in so many; the changes in between are then unaccounted for.
        loss: the trained loss; None: the trainer's (PreferenceTrainer, and TRL's DPOTrainer by its `loss_type`).
        output_dir: where rows go; None: the folder `entangle` in the trainer's output_dir.
        max_both_down: where the set doesn't decide: warn, once, when a larger share of the probed pairs is predicted to
            lose both log-probs. Where it is known that the set makes both log-probs fall or both rise, that is what the
            warning says, once each.
        batch_size: pairs of a probe's pass; None: as many as make 4096 tokens.

    Raises:
        TrainingError: nothing is asked for, or (when training begins) what is asked for can't be had.
    """

    def __init__(
        self,
        pairs: Pairs | Sequence[TokenizedPair] | int | None = None,
        *,
        every: int = 50,
        live: bool = False,
        ledger: bool = False,
        ledger_every: int = 1,
        loss: PreferenceLoss | str | Mapping[str, Any] | None = None,
        output_dir: str | Path | None = None,
        max_both_down: float = 0.5,
        batch_size: int | None = None,
    ) -> None:
        watched = tokenized_or_pairs(pairs)
        if not (watched or live) or (ledger and not watched):
            raise TrainingError(
                "EntanglementCallback needs something to watch: pairs=..., live=True or both; the ledger needs pairs."
            )
        self.pairs = watched
        self.every = every
        self.live = live
        self.ledger = ledger
        self.ledger_every = ledger_every
        self.loss = None if loss is None else build(loss)
        self.output_dir = output_dir
        self.max_both_down = max_both_down
        self.batch_size = batch_size
        self._trainer: Trainer | None = None
        self._alerted: set[str] = set()
        self._clear()

    def attach(self, trainer: Trainer) -> Self:
        """Add the callback to a trainer, and give it what callbacks aren't told: the trainer itself."""
        trainer.add_callback(self.tell(trainer))
        return self

    def tell(self, trainer: Trainer) -> Self:
        """Give the callback the trainer that somebody else adds it to."""
        self._trainer = trainer
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare, forget rows of steps that will be trained again, and probe the start."""
        self._clear()
        if is_sharded():
            logger.warning(
                "EntanglementCallback: this run shards its parameters (FSDP or DeepSpeed ZeRO-3), so they can't be "
                "probed in the training loop; nothing will be measured. Save checkpoints (save_steps) and probe them "
                f"with: entangle sweep {args.output_dir}"
            )
            return
        if self._trainer is None:
            if self.live or self.ledger:
                raise TrainingError("live=True and ledger=True need the trainer: callback.attach(trainer).")
            logger.warning(
                "EntanglementCallback: rows are written; for metrics in the log use attach(trainer)."
            )
        if (self.live or self.ledger) and Version(trl.__version__) < Version(FUSED_HEAD):
            raise TrainingError(
                f"live=True and ledger=True read log-probs as the models of TRL {FUSED_HEAD}'s trainers return them; "
                f"here is TRL {trl.__version__}. Use a probe set alone: pairs=..."
            )
        self._args = args
        self._loss = self.loss
        if self._loss is None and self._trainer is not None and self.pairs:
            self._loss = trained_loss(self._trainer)
        folder = Path(args.output_dir) / "entangle" if self.output_dir is None else Path(self.output_dir)
        self._steps = StepShards(folder, "steps")
        self._sets = StepShards(folder, "set")
        asked = {"live": self.live, "batches": self.live, "ledger": self.ledger}
        self._tables = {
            kind: StepRows(StepShards(folder, kind), args) for kind, is_asked in asked.items() if is_asked
        }
        model, self._optimizer = kwargs["model"], innermost(kwargs["optimizer"])
        if self.live:
            self._memory = batch_memory(model, self._optimizer)
        if self.live or self.ledger:
            self._batches = BatchRecorder(model, geometry=self.live, memory=self._memory)
        if self.pairs:
            self._set = self._probe_set(args, **kwargs)
        if self.ledger and self._set and self._batches and self._trainer:
            self._ledger_recorder = LedgerRecorder(
                self._set, self._batches, kwargs["optimizer"], self._trainer.accelerator
            )
        self._go_on(state.global_step)
        if state.global_step % self.every == 0:
            self._probe(state)

    def _clear(self) -> None:
        """Take off what an earlier training may have left."""
        for part in (getattr(self, "_batches", None), getattr(self, "_ledger_recorder", None)):
            if part is not None:
                part.remove()
        self._set: ProbeSet | None = None
        self._batches: BatchRecorder | None = None
        self._ledger_recorder: LedgerRecorder | None = None
        self._memory: BatchMemory | None = None
        self._window = pd.DataFrame()
        self._tables: dict[str, StepRows] = {}
        self._last_probe = -1

    def _probe_set(
        self, args: Any, model: Any, processing_class: Any, train_dataloader: Any = None, **_: Any
    ) -> ProbeSet:
        max_length = getattr(args, "max_length", None)
        if isinstance(self.pairs, int):
            trainer: Any = self._trainer
            data = getattr(train_dataloader, "dataset", None) if trainer is None else trainer.train_dataset
            pairs = training_pairs(data, self.pairs, max_length)
        else:
            pairs = self.pairs or ()
        return ProbeSet(
            pairs,
            model,
            getattr(processing_class, "tokenizer", processing_class),
            ref_model=getattr(self._trainer, "ref_model", None),
            max_length=max_length,
            batch_size=self.batch_size,
            process=(args.process_index, args.world_size),
        )

    def _go_on(self, step: int) -> None:
        """Take up what was written before `step`; what was written after it will be trained again."""
        earlier = [done for done in self._steps.steps if done <= step] if step else []
        if self._set and earlier:
            self._set.restore_reference(self._steps.read(earlier[0]))
            self._last_probe = earlier[-1]
        if self._args.world_size > 1:
            gather_object([step])  # nobody deletes what another process still reads
        if self._args.process_index == 0:
            for shards in self._shards:
                shards.drop_after(step)

    @property
    def _shards(self) -> list[StepShards]:
        return [self._steps, self._sets, *(table.shards for table in self._tables.values())]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The pairs come anew: a memory of them would meet them again."""
        if self._memory is not None:
            self._memory.forget()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step's gradients are there: take what the hooks have seen, and take the step apart."""
        if self._batches is None:
            return
        batches = self._batches.take()
        if not batches:
            raise TrainingError(
                "live=True and ledger=True read the log-probs that the trainer's model returns, and this one returns "
                "none. Use TRL's DPOTrainer or PreferenceTrainer, or a probe set alone."
            )
        if self.live:
            if any(batch.weighs_tokens for batch in batches):
                logger.warning_once(
                    "EntanglementCallback: this loss weighs tokens, so a response has no single upstream gradient and "
                    "live=True can't tell its score; such rows are marked unknown. A probe set (pairs=...) isn't "
                    "affected."
                )
            rows = [
                row
                for number, batch in enumerate(batches)
                for row in live_rows(batch, number, args.world_size)
            ]
            self._tables["live"].add([{"step": state.global_step + 1} | row for row in rows])
            if self._memory is not None and (found := self._memory.close()) is not None:
                self._tables["batches"].add([batch_row(state.global_step + 1, *found)])
        if self._ledger_recorder and (state.global_step + 1) % self.ledger_every == 0:
            self._ledger_recorder.before(state.global_step, batches)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is taken: measure what it did."""
        step = state.global_step + 1
        if self._ledger_recorder and step % self.ledger_every == 0:
            self._tables["ledger"].add(self._ledger_recorder.after(step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log and probe when it is time to."""
        if control.should_log:
            summaries = {"live": live_metrics, "ledger": ledger_metrics}
            for kind, table in self._tables.items():
                if kind == "batches":
                    self._log_batches(table.collect(), state.global_step)
                else:
                    self._log(summaries[kind](table.collect()))
        if state.global_step % self.every == 0 or control.should_training_stop:
            self._write(state.global_step)
            self._probe(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is written: so are the rows up to it, so that a resumed run finds them."""
        self._write(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe the end, put the rows into one table of each kind, and take the hooks off."""
        if self._set is None and self._batches is None:
            return
        self._write(state.global_step)
        self._probe(state)
        if args.process_index == 0:
            for shards in self._shards:
                shards.join()
        self._clear()

    def _write(self, step: int) -> None:
        for table in self._tables.values():
            table.write(step)

    def _probe(self, state: Any) -> None:
        if self._set is None or self._last_probe == state.global_step:
            return
        self._last_probe = state.global_step
        with self._batches.paused() if self._batches else nullcontext():
            metric = metric_of(self._optimizer, self._set.policy.parameters)
            found = self._set.measure(self._loss, self._args.per_device_train_batch_size, metric)
        rows, label = found.rows, None if self._loss is None else self._loss.label
        rows.insert(0, "step", state.global_step)
        sets = [{"step": state.global_step} | row for row in set_rows(found.sets, label)]
        if self._args.process_index == 0:
            self._steps.write(state.global_step, rows)
            if sets:
                self._sets.write(state.global_step, pd.DataFrame(sets))
        metrics = probe_metrics(rows)
        self._log(set_metrics(sets) | metrics)
        self._warn_of_probe(state.global_step, found, metrics.get(f"entangle/probe/{Regime.BOTH_DOWN}", 0.0))

    def _warn_of_probe(self, step: int, found: Probed, share: float) -> None:
        """Say, once each, what the set does if it isn't what a loss is for; where it can't tell, what the pairs do."""
        label = None if self._loss is None else self._loss.label
        content = found.sets.get("adamw", found.sets.get("sgd"))
        if content is not None and label is not None and label in content["losses"]:
            if (said := set_alert(content, label)) is not None:
                self._alert(said[0], f"At step {step}: {said[1]}")
            if finding(content["losses"][label]) not in (UNKNOWN, UNSURE):
                return
        if share > self.max_both_down:
            self._alert(
                ALERTS[FALL],
                f"At step {step}, {share:.0%} of the {len(found.rows)} probed pairs are predicted to lose log-prob of "
                f"both responses (more than max_both_down={self.max_both_down:g}).",
            )

    def _log_batches(self, rows: pd.DataFrame, step: int) -> None:
        """What the last steps' batches say of fresh pairs, and a warning if it isn't what a loss is for."""
        if rows.empty:
            return
        self._window = pd.concat([self._window, rows], ignore_index=True)
        self._window = self._window[self._window["step"] > self._window["step"].max() - WINDOW]
        metrics, move = batch_metrics(self._window)
        self._log(metrics)
        if isinstance(getattr(self._trainer, "mitigation", None), Steering):
            return  # the step isn't the loss's own, and is being taken care of
        if move is not None and (title := ALERTS.get(finding(move))) is not None:
            self._alert(title, f"At step {step}: {live_verdict(move, move['steps'], move['pairs'])}")

    def _alert(self, title: str, text: str) -> None:
        """Warn once under a title."""
        if title not in self._alerted and self._args.process_index == 0:
            self._alerted.add(title)
            alert(title, text, self._args.report_to)

    def _log(self, metrics: dict[str, float]) -> None:
        """A row of its own in the run's log; TRL's `log` would empty its buffers into it."""
        if self._trainer is not None and metrics:
            was_due = self._trainer.control.should_log
            Trainer.log(self._trainer, metrics)
            self._trainer.control.should_log = was_due  # the step's own row is still to come


def tokenized_or_pairs(
    pairs: Pairs | Sequence[TokenizedPair] | int | None,
) -> Sequence[PreferencePair | TokenizedPair] | int | None:
    """Whatever stands for a probe set as pairs, or the number of pairs that the training set is to lend."""
    if pairs is None or isinstance(pairs, int):
        return pairs
    if not isinstance(pairs, str | Path) and not len(pairs):
        return None
    if isinstance(pairs, Sequence) and any(isinstance(pair, TokenizedPair) for pair in pairs):
        return cast(Sequence[PreferencePair | TokenizedPair], pairs)
    return load_pairs(cast(Pairs, pairs))


def alert(title: str, text: str, trackers: Sequence[str]) -> None:
    """Warn on the console, and in those of the run's trackers that know alerts.

    Args:
        title: a few words.
        text: a sentence.
        trackers: names of those that the run reports to.
    """
    logger.warning(f"{title}: {text}")
    for tracker in ("trackio", "wandb"):
        if tracker in trackers:
            try:
                importlib.import_module(tracker).alert(title=title, text=text)
            except Exception as error:  # a tracker's trouble must not end a training run
                logger.warning(f"The alert didn't reach {tracker}: {error}")


def is_sharded() -> bool:
    """Whether the parameters are spread over processes, so that none can run the model alone."""
    state = AcceleratorState()
    if state.distributed_type == DistributedType.DEEPSPEED:
        return state.deepspeed_plugin is not None and state.deepspeed_plugin.zero_stage == 3
    return state.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM)


def trained_loss(trainer: Trainer) -> PreferenceLoss:
    """The loss that a trainer trains.

    Raises:
        TrainingError: it can't be told; the message says to give it.
    """
    if isinstance(own := getattr(trainer, "loss", None), PreferenceLoss):
        return own
    if not isinstance(trainer, DPOTrainer):
        raise TrainingError(
            f"What {type(trainer).__name__} trains can't be told from outside. Give EntanglementCallback(loss=...)."
        )
    args = vars(trainer.args)
    options = {option: args[option] for option in ("beta", *LOSS_OPTIONS, *OLD_OPTIONS) if option in args}
    if "loss_type" not in options or "beta" not in options:
        raise TrainingError(
            f"What {type(trainer).__name__} trains can't be told: its arguments have no loss_type and beta. Give "
            "EntanglementCallback(loss=...)."
        )
    spec = losses_of_trl(options)[0]
    said = names_in_trl(spec) | {"loss_type", "loss_weights", "beta"}
    silent = [
        f"{f.name}={options[f.name]!r}"
        for f in fields(trainer.args)
        if f.name in options and f.name not in said and options[f.name] != f.default
    ]
    if silent:
        raise TrainingError(
            f"The trainer's loss_type={options['loss_type']} is changed by {', '.join(silent)}; which loss of the "
            "catalogue that is can't be told. Give EntanglementCallback(loss=...); see `entangle losses`."
        )
    return build(spec)
