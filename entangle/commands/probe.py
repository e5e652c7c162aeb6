"""The probe: every pair's geometry once, then every loss, into a run folder that can be resumed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from rich.console import Console, RenderableType
from torch import Tensor

from entangle import embedded
from entangle.analysis.geometry import GEOMETRY_COLUMNS, RESOLUTION
from entangle.analysis.predictions import (
    FLAGS,
    check_labels,
    may_have_reference,
    predict_losses,
    usable_losses,
)
from entangle.analysis.summary import summarise
from entangle.config import DEFAULT_LOSSES, EMBEDDED, ProbeConfig, build_losses
from entangle.data import PreferencePair, TokenizedPair, fingerprint, tokenize_pair
from entangle.diagnostics import columns_of, compute, resolve, summarise_diagnostics
from entangle.errors import ConfigError
from entangle.measure.inputs import load_pairs_of, load_policy_of
from entangle.measure.modules import module_rows, summarise_modules
from entangle.measure.verification import summarise_verification, verify_losses
from entangle.models import (
    Policy,
    check_positions,
    check_reference,
    hash_file,
    load_adam_state,
    optimizer_file,
)
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted, deferred_interrupt, notes_console, progress_bar
from entangle.runs.provenance import environment
from entangle.scores import Engine, Metric, PairScores, fast_gemm, make_engine
from entangle.scores.rows import RowBatch
from entangle.tables.base import Shown
from entangle.tables.probe import probe_tables
from losses import PreferenceLoss

TOKENS_PER_PASS = 4096
"""Padded tokens of a pass when no batch size is given."""


NUMBERS = (
    *GEOMETRY_COLUMNS, "logps_chosen", "logps_rejected", "ref_logps_chosen", "ref_logps_rejected",
    "cosine", "band_lower", "band_upper",
)  # fmt: skip
"""Columns of a pair that are numbers from the model."""

ROW_COLUMNS = (
    *NUMBERS, *FLAGS, "index", "prompt_hash", "prompt_length", "length_chosen", "length_rejected",
    *columns_of(["all"]),
)  # fmt: skip
"""Columns of a run folder's pairs; a column of the data set with such a name is stored as data_<name>."""


@dataclass(frozen=True)
class ProbeResult(Shown):
    """A finished probe: its rows as data frames, its aggregates, its folder.

    Args:
        run: the run folder.
        pairs: one row per pair.
        predictions: one row per scored pair and loss.
        summary: aggregates of these rows.
    """

    run: RunFolder
    pairs: pd.DataFrame
    predictions: pd.DataFrame
    summary: dict[str, Any]

    @property
    def modules(self) -> pd.DataFrame | None:
        """One row per scored pair and module (see `entangle.measure.modules.module_rows`); None where not asked for."""
        return self.run.table("modules.parquet")

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read a finished run folder.

        Raises:
            RunError: there is none at `path`.
        """
        run = RunFolder.open(path, ProbeConfig.VERB)
        predictions = run.table("predictions.parquet")
        assert predictions is not None  # written before the summary that makes a run complete
        return cls(run, run.pairs(), predictions, run.read_json("summary.json"))

    def renderable(self, worst: int = 3) -> RenderableType:
        """The tables as rich objects: regimes, groups, distributions and the `worst` pairs."""
        return probe_tables(
            self.summary,
            self.run.read_json("provenance.json"),
            self.pairs,
            self.predictions,
            self.run.table("texts.parquet"),
            worst,
        )


@dataclass(frozen=True)
class Plan:
    """The pairs of a probe in the order in which they are computed, cut into shards and passes.

    It depends on the options and the data alone, so a resumed run computes exactly what an unbroken one would.
    """

    shards: tuple[tuple[TokenizedPair, ...], ...]
    batch_size: int | None

    @classmethod
    def make(cls, pairs: Sequence[TokenizedPair], config: ProbeConfig) -> Plan:
        """Sort by length, so that a pass holds little padding, and cut."""
        ordered = sorted(pairs, key=lambda pair: (longest(pair), len(pair.prompt_ids), pair.index))
        size = config.shard_size
        shards = tuple(tuple(ordered[start : start + size]) for start in range(0, len(ordered), size))
        return cls(shards, config.batch_size)

    def passes(self, shard: int) -> Iterator[list[TokenizedPair]]:
        """The scorable pairs of a shard, as many at a time as go through the model together."""
        batch: list[TokenizedPair] = []
        for pair in filter(is_scorable, self.shards[shard]):
            limit = self.batch_size or max(1, TOKENS_PER_PASS // (2 * longest(pair)))
            if len(batch) >= limit:  # pairs grow longer, so the newest one decides
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch


@dataclass(frozen=True)
class Pass:
    """Pairs that went through the model together.

    Args:
        pairs: the pairs.
        rows: their rows, as the model read them.
        scores: what the engine found.
        policy: the model.
    """

    pairs: Sequence[TokenizedPair]
    rows: RowBatch
    scores: PairScores
    policy: Policy


Columns = Callable[[Pass], Mapping[str, Tensor]]
"""What a pass says of its pairs: `(pairs,)` by name of the column."""


@dataclass(frozen=True)
class Work:
    """What every pass of a probe needs.

    Args:
        policy: the model.
        engine: its scores.
        columns: what is written of every pair.
        modules: whether the scores are wanted by module too.
        metric: the diagonal metric; None is SGD's.
    """

    policy: Policy
    engine: Engine
    columns: Sequence[Columns]
    modules: bool = False
    metric: Metric | None = None


def longest(pair: TokenizedPair) -> int:
    """Tokens of the longer of a pair's two rows."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def is_scorable(pair: TokenizedPair) -> bool:
    """Whether both responses have a token to score."""
    return not (pair.dropped or pair.empty)


def run_probe(config: ProbeConfig, console: Console | None = None) -> ProbeResult:
    """Probe a policy on preference pairs: the main job, from options to a finished run folder.

    Computes A, B, c and both gaps of every pair exactly over the probed parameters, log-probs under policy and
    reference, then every loss's incentives, predicted changes and regimes. A run that was broken off is resumed.
    Under `accelerate launch` or `torchrun` the processes share the shards and write one folder.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: an option, the data, the model or the run folder can't be used.
        Interrupted: Ctrl-C; the shard at hand is finished first.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    console = notes_console(console, is_shown=processes.is_main_process)
    losses = build_losses(config.losses)
    check_labels(losses)  # before the model is loaded, if a name is wrong
    resolve(config.diagnostics)
    pairs = load_pairs_of(config)
    _check_group(config, pairs)
    policy = load_policy_of(config, processes)
    tokenized = [tokenize_pair(policy.tokenizer, pair, config.max_length) for pair in pairs]
    notes = [
        *policy.notes,
        *check_positions(policy.model, max(map(longest, filter(is_scorable, tokenized)), default=0)),
    ]
    metric = None
    identity = dict(policy.identity) | {"data": fingerprint(pairs)}
    if config.optimizer_state is not None:
        state = load_adam_state(config.optimizer_state, policy.model, policy.trained)
        metric = state.metric(policy.parameters)
        identity["optimizer"] = hash_file(optimizer_file(config.optimizer_state))
        notes.append(
            "Scores are compared, and changes predicted to first order, under AdamW's preconditioner frozen after "
            f"{state.step} updates; a change is per unit of learning rate, without momentum and weight decay."
        )
    run = RunFolder(config.run_path)
    with processes.main_process_first():
        run.begin(config, identity, overwrite=config.overwrite and processes.is_main_process)
    if run.is_complete:
        console.print(f"{run.path} holds this run already; nothing to compute.", markup=False)
        return ProbeResult.load(run.path)
    started = time.monotonic()
    plan = Plan.make(tokenized, config)
    engine = make_engine(policy.model, policy.parameters, config.engine)
    _check_first_pair(policy, plan)
    work = Work(policy, engine, column_functions(config), config.modules, metric)
    with fast_gemm() if config.fast_matmul else nullcontext():
        _compute(plan, run, work, console, processes)
    processes.wait_for_everyone()
    if processes.is_main_process:
        notes += engine.notes
        _finish(run, config, losses, work, pairs, tokenized, console, notes, time.monotonic() - started)
    processes.wait_for_everyone()
    return ProbeResult.load(run.path)


def _finish(
    run: RunFolder, config: ProbeConfig, losses: Sequence[PreferenceLoss], work: Work,
    pairs: Sequence[PreferencePair], tokenized: Sequence[TokenizedPair], console: Console, notes: Sequence[str],
    seconds: float,
) -> None:  # fmt: skip
    """Judge every loss on the finished rows, verify if asked, and write what closes a run, its summary last."""
    policy = work.policy
    for note in notes:
        console.print(f"Note: {note}", markup=False)
    rows = run.pairs()
    usable = _usable(losses, rows, config, console)
    resolution = work.engine.resolution
    predictions = predict_losses(rows, usable, resolution=resolution, batch_size=config.loss_batch_size)
    summary = summarise(rows, predictions, config.group_by)
    if config.verify:
        by_index = {pair.index: pair for pair in tokenized}
        with progress_bar(console, "real steps", config.verify * len(usable), 0) as advance:
            steps = verify_losses(
                policy, by_index, rows, predictions, usable, config.verify, resolution, advance
            )
        run.write_table("verification.parquet", steps)
        summary["verification"] = summarise_verification(steps)
    if config.modules and (files := sorted((run.path / "modules").glob("[0-9]*.parquet"))):
        modules = pd.concat(map(pd.read_parquet, files), ignore_index=True)
        run.write_table("modules.parquet", modules.sort_values("index", kind="stable"))
        summary["modules"] = summarise_modules(modules, rows)
    if config.diagnostics:
        columns = columns_of(config.diagnostics)
        summary["diagnostics"] = summarise_diagnostics(rows, predictions, columns)
    if config.save_text:
        run.write_table("texts.parquet", texts_of(pairs))
    run.write_table("predictions.parquet", predictions)
    facts = {
        "resolution": resolution,
        "metric": config.metric,
        "engine": config.engine,
        "seconds": seconds,
        "notes": notes,
    }
    own = {str(embedded.POLICY), str(embedded.ADAPTER)}  # not the place where this installation keeps them
    described = {name: EMBEDDED if value in own else value for name, value in policy.description.items()}
    run.write_json("provenance.json", environment() | described | facts)
    run.write_json("summary.json", summary)
    shutil.rmtree(run.path / "modules", ignore_errors=True)  # what its shards hold is in modules.parquet


def _check_group(config: ProbeConfig, pairs: Sequence[PreferencePair]) -> None:
    """Refuse to group by a column that nothing has; the default one may be absent."""
    there = {name for pair in pairs for name in pair.extra}
    if config.group_by not in {*there, *ROW_COLUMNS, ProbeConfig.group_by}:
        raise ConfigError(
            f"Expected a column {config.group_by!r} in the data, to group by; its further columns are: "
            f"{', '.join(sorted(there)) or 'none'}."
        )


def _check_first_pair(policy: Policy, plan: Plan) -> None:
    first = next((batch for shard in range(len(plan.shards)) for batch in plan.passes(shard)), None)
    if first is not None:
        check_reference(policy, policy.collate(first[:1]))


def _compute(plan: Plan, run: RunFolder, work: Work, console: Console, processes: PartialState) -> None:
    """Write every shard of this process that isn't there yet; on Ctrl-C, finish the one at hand, then Interrupted."""
    done = set(run.shards)
    own = range(processes.process_index, len(plan.shards), processes.num_processes)
    left = [number for number in own if number not in done]
    total = sum(len(plan.shards[number]) for number in own)
    finished = total - sum(len(plan.shards[number]) for number in left)
    if done:
        console.print(f"Resuming {run.path}: {finished} of {total} pairs are there.")
    with progress_bar(console, "pairs", total, finished) as advance, deferred_interrupt() as interrupted:
        for number in left:
            rows, modules = rows_of_shard(plan, number, work, advance)
            if modules:  # first, since a shard counts as finished once its pairs are there
                run.write_table(f"modules/{number:05d}.parquet", pd.concat(modules, ignore_index=True))
            run.write_shard(number, pd.DataFrame(rows))
            if interrupted():
                raise Interrupted(
                    f"Stopped; {len(run.shards)} of {len(plan.shards)} shards are in {run.path}. "
                    f"Go on with: {run.resume_command}"
                )


Rows = tuple[list[dict[str, Any]], list[pd.DataFrame]]
"""Rows of pairs, and of their modules where these are wanted."""


def rows_of_shard(plan: Plan, number: int, work: Work, advance: Callable[[int], None]) -> Rows:
    """The rows of a shard's pairs, and of their modules where asked for; `advance` is told of every pass."""
    rows = [_unscored_row(pair) for pair in plan.shards[number] if not is_scorable(pair)]
    modules: list[pd.DataFrame] = []
    advance(len(rows))
    for batch in plan.passes(number):
        scored, parts = _scored_rows(batch, work)
        rows += scored
        modules += parts
        advance(len(batch))
    return rows, modules


def _scored_rows(batch: list[TokenizedPair], work: Work) -> Rows:
    """Rows of one pass; a pass that doesn't fit the memory is halved until it does."""
    try:
        return rows_of_pass(batch, work)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(batch) // 2
    (first, ahead), (second, behind) = _scored_rows(batch[:half], work), _scored_rows(batch[half:], work)
    return first + second, ahead + behind


def rows_of_pass(batch: Sequence[TokenizedPair], work: Work) -> Rows:
    """The rows of pairs that go through the model together, and of their modules where asked for."""
    rows = work.policy.collate(batch)
    scores = work.engine.pairs(rows, modules=work.modules, metric=work.metric)
    done = Pass(batch, rows, scores, work.policy)
    columns = {name: value.tolist() for measure in work.columns for name, value in measure(done).items()}
    described = [
        _description(pair) | {name: values[i] for name, values in columns.items()}
        for i, pair in enumerate(batch)
    ]
    return described, [module_rows([pair.index for pair in batch], scores)] if work.modules else []


def column_functions(config: ProbeConfig) -> list[Columns]:
    """What is written of every pair: each function adds its columns to the rows."""
    if not config.diagnostics:
        return [number_columns]
    return [number_columns, lambda done: compute(config.diagnostics, done.policy, done.rows, done.pairs)]


def number_columns(done: Pass) -> dict[str, Tensor]:
    """The Gram block, log-probs under policy and reference, lengths, and whether all of it is finite."""
    geometry = done.scores.geometry
    chosen, rejected = done.scores.logps.double().cpu().chunk(2)
    is_one = done.policy.is_its_reference
    reference = done.scores.logps if is_one else done.policy.reference.logps(done.rows, done.pairs)
    numbers = {name: getattr(geometry, name).cpu() for name in GEOMETRY_COLUMNS}
    numbers |= {"logps_chosen": chosen, "logps_rejected": rejected}
    nothing = torch.full_like(chosen, torch.nan)
    ref_chosen, ref_rejected = (nothing, nothing) if reference is None else reference.double().cpu().chunk(2)
    ref_chosen, ref_rejected = _same_if_untold(ref_chosen, chosen), _same_if_untold(ref_rejected, rejected)
    numbers |= {"ref_logps_chosen": ref_chosen, "ref_logps_rejected": ref_rejected}
    finite = torch.stack([v for k, v in numbers.items() if reference is not None or not k.startswith("ref_")])
    length_chosen, length_rejected = done.rows.lengths.cpu().chunk(2)
    lower, upper = geometry.critical_ratio
    return numbers | {
        "cosine": geometry.cosine, "band_lower": lower, "band_upper": upper, "length_chosen": length_chosen,
        "length_rejected": length_rejected, "non_finite": ~finite.isfinite().all(0),
    }  # fmt: skip


def _same_if_untold(reference: Tensor, logps: Tensor) -> Tensor:
    """The reference log-prob, or the policy's own where float32 can't tell the two apart.

    Policy and reference may be one function computed along two paths (two copies of a model). The rounding between
    them must not decide on which side of a loss's kink at log-ratio 0 (DPOP) a pair falls.
    """
    untold = (reference - logps).abs() <= RESOLUTION[torch.float32] * logps.abs().clamp(min=1.0)
    return torch.where(untold, logps, reference)


def _unscored_row(pair: TokenizedPair) -> dict[str, Any]:
    """A pair that can't be scored: it keeps its row, with empty numbers and the flag that says why."""
    lengths = {"length_chosen": len(pair.chosen_ids), "length_rejected": len(pair.rejected_ids)}
    return _description(pair) | dict.fromkeys(NUMBERS, float("nan")) | lengths | {"non_finite": False}


def _description(pair: TokenizedPair) -> dict[str, Any]:
    extra = {f"data_{name}" if name in ROW_COLUMNS else name: value for name, value in pair.extra.items()}
    flags = {name: getattr(pair, name) and not pair.dropped for name in ("truncated", "identical", "empty")}
    description = {
        "index": pair.index,
        "prompt_hash": pair.prompt_hash,
        "prompt_length": len(pair.prompt_ids),
    }
    return extra | description | flags | {"dropped": pair.dropped}


def _usable(
    losses: Sequence[PreferenceLoss], rows: pd.DataFrame, config: ProbeConfig, console: Console
) -> list[PreferenceLoss]:
    """The losses that the rows can judge. One that can't be judged is an error if the user named it."""
    usable, refused = usable_losses(losses, has_reference=may_have_reference(rows))
    if refused and tuple(config.losses) != DEFAULT_LOSSES:
        raise ConfigError(" ".join(refused))
    for sentence in refused:
        console.print(f"Note: {sentence}", markup=False)
    return usable


def texts_of(pairs: Sequence[PreferencePair]) -> pd.DataFrame:
    """index, prompt, chosen, rejected as text; conversations as their turns."""
    return pd.DataFrame(
        [
            {
                "index": p.index,
                "prompt": _text(p.prompt),
                "chosen": _text(p.chosen),
                "rejected": _text(p.rejected),
            }
            for p in pairs
        ]
    )


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in content)
