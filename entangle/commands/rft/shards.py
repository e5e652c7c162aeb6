"""Answers shard by shard: resumable, shared among processes, stopped by Ctrl-C after the shard at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
from accelerate import PartialState
from rich.console import Console

from entangle.commands.rft.work import Work
from entangle.models import check_reference
from entangle.rewards.rollouts import Prompt, Rollout
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted, deferred_interrupt, progress_bar

FOLDER = "answers"


def compute_shards(
    run: RunFolder, work: Work, prompts: Sequence[Prompt], read: Sequence[Rollout], console: Console,
    processes: PartialState,
) -> None:  # fmt: skip
    """Write every shard of this process that isn't there yet; return when all processes have theirs.

    What is drawn for a prompt depends on the options and on its shard, not on the process or on what was
    computed before.

    Args:
        run: where to.
        work: what makes a row of a prompt.
        prompts: all prompts, in their order.
        read: answers that were read; none: they are sampled.
        console: where progress goes.
        processes: this process among the others.

    Raises:
        Interrupted: Ctrl-C; the shard at hand is finished.
    """
    size, rollouts = work.config.shard_size, {rollout.prompt.index: rollout for rollout in read}
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    done = {int(file.stem) for file in (run.path / FOLDER).glob("[0-9]*.parquet")}
    own = range(processes.process_index, len(shards), processes.num_processes)
    total = sum(len(shards[number]) for number in own)
    finished = sum(len(shards[number]) for number in own if number in done)
    if done:
        console.print(f"Resuming {run.path}: {finished} of {total} prompts are there.", markup=False)
    with progress_bar(console, "prompts", total, finished) as advance, deferred_interrupt() as interrupted:
        for number in own:
            if number in done:
                continue
            rows = _shard_rows(work, shards[number], rollouts, advance)
            run.write_table(f"{FOLDER}/{number:05d}.parquet", pd.DataFrame(rows))
            if interrupted():
                raise Interrupted(
                    f"Stopped; the finished shards are in {run.path}. Go on with: {run.resume_command}"
                )
    processes.wait_for_everyone()


def _shard_rows(
    work: Work, prompts: Sequence[Prompt], read: dict[int, Rollout], advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    rollouts = read or work.rollouts(prompts)
    first = next((r for p in prompts if (r := rollouts.get(p.index)) is not None and not r.is_empty), None)
    if first is not None:
        check_reference(work.policy, first.collate(work.policy.pad_id).to(work.policy.device))
    rows = []
    for prompt in prompts:
        rows.append(work.row(prompt, rollouts.get(prompt.index)))
        advance(1)
    return rows


def answer_rows(run: RunFolder) -> pd.DataFrame:
    """The rows of all shards, in dataset order: what prompts.parquet is computed from."""
    files = sorted((run.path / FOLDER).glob("[0-9]*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
