"""The probe on objects in memory: no file is read but what the pairs name, and none is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from torch.optim import Optimizer

from entangle.analysis.real_steps import is_refuted, verification_sentences
from entangle.commands.probe.judged import judge, provenance_of
from entangle.commands.probe.prepared import Prepared, check_group, check_request
from entangle.commands.probe.result import ProbeResult
from entangle.config import DEFAULT_LOSSES, ProbeConfig, build_losses
from entangle.data import Pairs, pairs_of
from entangle.errors import ConfigError, ModelError
from entangle.measure.passes import rows_of_shard
from entangle.measure.rows import texts_of
from entangle.measure.sets import SetSums
from entangle.models import Policy, adam_state_of, load_adam_state
from entangle.runs.folder import as_json, joined
from entangle.runs.progress import notes_console, progress_bar, say
from entangle.scores import fast_gemm


def probe(
    policy: Policy,
    pairs: Pairs,
    losses: Sequence[Any] = DEFAULT_LOSSES,
    *,
    max_length: int = ProbeConfig.max_length,
    skip_invalid: bool = ProbeConfig.skip_invalid,
    group_by: str = ProbeConfig.group_by,
    loss_batch_size: int = ProbeConfig.loss_batch_size,
    optimizer: Optimizer | str | Path | None = None,
    modules: bool = ProbeConfig.modules,
    diagnostics: Sequence[str] = ProbeConfig.diagnostics,
    verify: int = ProbeConfig.verify,
    batch_size: int | None = ProbeConfig.batch_size,
    engine: str = ProbeConfig.engine,
    fast_matmul: bool = ProbeConfig.fast_matmul,
    console: Console | None = None,
) -> ProbeResult:
    """Probe a policy on preference pairs, in memory: what `run_probe` computes, without a run folder.

        policy = entangle.load_policy("run/checkpoint-200")      # or entangle.Policy.of(model, tokenizer)
        found = entangle.probe(policy, pairs, losses=[DPO(), SimPO(beta=2.5)])
        found.set.drift["dpo"].value, found.predictions

    The model may be in the middle of its training: it comes back as it was (weights, `.grad`, mode, `requires_grad`,
    random state), and the training goes on bit for bit.

    Args:
        policy: from `load_policy`, or `Policy.of` for a model in memory.
        pairs: what stands for them (see `entangle.data.pairs_of`): `embedded`, a path, a `datasets.Dataset`, a list of
            dicts, or pairs; columns under other names: `load_pairs(..., columns={"chosen": "better"})`.
        losses: loss objects, names, or `name:key=value,...`; by default those of the paper's comparison.
        max_length: tokens of prompt + response; longer responses are cut at the right, longer prompts dropped.
        skip_invalid: leave out rows that can't be used, instead of refusing the data.
        group_by: column of the data by which the aggregates are broken down, where it is there.
        loss_batch_size: pairs per batch for losses whose incentives depend on the batch, in dataset order.
        optimizer: AdamW, for its metric in the place of SGD's: the optimiser itself, or a checkpoint's folder.
        modules: take the scores apart by module too.
        diagnostics: names of diagnostics to compute beside the geometry, or `all`.
        verify: check the predictions by real SGD steps on this many pairs; the weights are restored.
        batch_size: pairs per pass; by default as many as fit 4096 tokens.
        engine: `auto`, `factored`, or `autograd`, the slow oracle.
        fast_matmul: float32 matrix products by oneDNN on the CPU.
        console: where progress and notes go; standard error by default.

    Returns:
        The rows, predictions and aggregates; `folder` has none.

    Raises:
        UserError: an option, the data or the model can't be used.
    """
    started = time.monotonic()
    if not isinstance(policy, Policy):
        raise ModelError(
            f"Expected a Policy; got {type(policy).__name__}. Make one with entangle.load_policy(NAME), or of a model "
            "in memory with entangle.Policy.of(model, tokenizer)."
        )
    options = ProbeConfig(
        max_length=max_length,
        skip_invalid=skip_invalid,
        group_by=group_by,
        loss_batch_size=loss_batch_size,
        modules=modules,
        diagnostics=tuple(diagnostics),
        verify=verify,
        batch_size=batch_size,
        engine=engine,  # pyright: ignore
        fast_matmul=fast_matmul,
    )
    judged_losses = build_losses(losses)
    if not judged_losses:
        raise ConfigError("At least one loss is needed; got none. `entangle losses` lists them.")
    if optimizer is not None and verify:
        raise ConfigError("verify takes real SGD steps, and an optimizer is given. Drop one of them.")
    are_named = tuple(losses) != DEFAULT_LOSSES
    check_request(options, judged_losses, are_named=are_named)
    shown = notes_console(console)
    data = pairs_of(pairs, skip_invalid=skip_invalid)
    check_group(group_by, data.pairs)
    with policy.ready(), fast_gemm() if fast_matmul else nullcontext():
        prepared = Prepared.make(options, judged_losses, are_named, policy, data.pairs)
        if optimizer is not None:
            prepared = prepared.under(_adam_state(optimizer, policy))
        for note in (*data.notes, *prepared.notes):
            say(shown, note)
        plan = prepared.plan
        sums = SetSums.over(policy.parameters, prepared.tokens, group_by)
        measurement = prepared.measurement(plan, sums)
        shards: list[pd.DataFrame] = []
        parts: list[pd.DataFrame] = []
        with progress_bar(shown, "pairs", sum(plan.sizes), 0) as advance:
            for number in range(len(plan.shards)):
                measured = rows_of_shard(plan, number, measurement, advance)
                shards.append(pd.DataFrame(measured.rows))
                parts += measured.modules
        grams = None if sums is None else sums.joined(prepared.metric)
        rows, by_module = joined(shards), joined(parts) if parts else pd.DataFrame()
        whole = None if sums is None or grams is None else (grams, sums.grouping)
        judged = judge(prepared, measurement.engine, rows, by_module, whole, shown)
    checked = judged.summary.get("verification")
    refuted = verification_sentences(checked) if checked is not None and is_refuted(checked) else []
    for note in (
        *measurement.engine.notes,
        *judged.left_out,
        *filter(None, [judged.resolution.note]),
        *refuted,
    ):
        say(shown, note)
    notes = (*data.notes, *prepared.notes, *measurement.engine.notes)
    name = str(pairs) if isinstance(pairs, str | Path) else None
    provenance = provenance_of(prepared, judged, time.monotonic() - started, notes, dataset_name=name)
    return ProbeResult(
        pairs=rows,
        predictions=judged.predictions,
        summary=as_json(judged.summary),
        provenance=as_json(provenance),
        texts=texts_of(prepared.pairs),
        modules=by_module if modules and len(by_module) else None,
        steps=judged.steps,
        set_content=None if judged.set is None else as_json(judged.set),
        loss_batch_size=loss_batch_size,
    )


def _adam_state(optimizer: Optimizer | str | Path, policy: Policy):
    if isinstance(optimizer, Optimizer):
        return adam_state_of(optimizer.state_dict(), policy.model, policy.trained)
    return load_adam_state(optimizer, policy.model, policy.trained)
