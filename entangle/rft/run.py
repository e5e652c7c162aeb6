"""`entangle rft`: does a policy's reward vary within a prompt, and what gradient does that leave?

prompts -> K answers each -> rewards, log-probs, Gram matrix (answers/00000.parquet, resumable)
        -> signals (prompts.parquet) -> summary.json, figures
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console, RenderableType

from entangle import embedded
from entangle.config import EMBEDDED, RftConfig
from entangle.errors import ConfigError, RunError
from entangle.gamma import jacobian_norm
from entangle.graders import AnswerSet, FromFile, Grader, GraderError, build_grader
from entangle.inputs import load_policy_of
from entangle.models import Policy, check_reference
from entangle.progress import Interrupted, deferred_interrupt, progress_bar
from entangle.provenance import environment
from entangle.report import rft_tables
from entangle.rewards import Support
from entangle.rollouts import (
    Prompt,
    Rollout,
    Sampling,
    fingerprint,
    load_prompts,
    load_rollouts,
    prompt_tokens,
    sample_answers,
)
from entangle.runs import RunFolder
from entangle.scores import Engine, make_engine, row_logps
from entangle.signals import Setting, Thresholds, measure, summarise, unmeasured

FLAGS = ("dropped", "empty", "non_finite")
"""Why a prompt has no numbers: it leaves no room for an answer; an answer has no token; a reward or score isn't a
number."""

FOLDER = "answers"


@dataclass(frozen=True)
class RftResult:
    """A finished run.

    Args:
        run: its folder.
        prompts: one row per prompt.
        summary: aggregates of these rows.
    """

    run: RunFolder
    prompts: pd.DataFrame
    summary: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> RftResult:
        """Read a finished run folder.

        Raises:
            RunError: there is none at `path`.
        """
        run = RunFolder(path)
        prompts = run.table("prompts.parquet")
        if prompts is None or not run.is_complete:
            raise RunError(f"Expected a finished run of entangle rft at {run.path}; found none.")
        return cls(run, prompts, run.read_json("summary.json"))

    def renderable(self, worst: int = 3) -> RenderableType:
        """The tables as rich objects: prevalence, distributions, gradients, and the `worst` prompts."""
        return rft_tables.report(self.summary, self.run.read_json("provenance.json"), self.prompts, worst)


def run_rft(config: RftConfig, console: Console | None = None) -> RftResult:
    """Measure the reward spread and the expected reward gradient of every prompt, from options to a run folder.

    A run that was broken off is resumed: answers are kept by shards, and what is drawn depends on the options
    alone.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: an option, the data, the model, the reward or the run folder can't be used.
        Interrupted: Ctrl-C; the shard at hand is finished first.
    """
    console = console or Console(stderr=True)
    grader = grader_of(config)
    prompts = _load_prompts(config) if config.rollouts is None else []
    policy = load_policy_of(config)
    read = _load_rollouts(config, policy)
    prompts = prompts or [rollout.prompt for rollout in read]
    run = RunFolder(config.run_path)
    identity = dict(policy.identity) | {"data": fingerprint(prompts), "rollouts": _fingerprint(read)}
    run.begin(config.recorded, identity, overwrite=config.overwrite)
    _make_shard_folder(run)
    if run.is_complete:
        console.print(f"{run.path} holds this run already; nothing to compute.", markup=False)
        return RftResult.load(run.path)
    started = time.monotonic()
    engine = make_engine(policy.model, policy.parameters, config.engine)
    gamma_indices = frozenset(prompt.index for prompt in prompts[: config.gamma_positions])
    work = Work(config, policy, engine, grader, gamma_indices)
    shards = [
        (prompts[start : start + config.shard_size], read[start : start + config.shard_size])
        for start in range(0, len(prompts), config.shard_size)
    ]
    _compute(run, work, shards, console)
    _finish(run, work, console, time.monotonic() - started)
    return RftResult.load(run.path)


def grader_of(config: RftConfig) -> Grader:
    """The reward that the options name: by default the file's own with a rollouts file, else ROUGE-L."""
    default = FromFile.name if config.rollouts else "rouge_l"
    return build_grader(default if config.reward is None else config.reward)


def _load_prompts(config: RftConfig) -> list[Prompt]:
    columns = config.column_map
    unknown = sorted(set(columns) - {"prompt"})
    if unknown:
        raise ConfigError(
            f"--columns names the prompt column here (prompt=NAME); got {unknown[0]!r}. A reference text is named by "
            "its reward, as rouge_l:reference=NAME."
        )
    name = str(embedded.PAIRS) if config.dataset_name == EMBEDDED else config.dataset_name
    return load_prompts(
        name, split=config.dataset_train_split, config=config.dataset_config, column=columns.get("prompt", "prompt"),
        limit=config.limit, seed=config.seed,
    )  # fmt: skip


def _load_rollouts(config: RftConfig, policy: Policy) -> list[Rollout]:
    if config.rollouts is None:
        return []
    return load_rollouts(config.rollouts, policy.tokenizer, max_length=config.max_length, limit=config.limit)


def _fingerprint(rollouts: Sequence[Rollout]) -> str | None:
    if not rollouts:
        return None
    rows = [
        Prompt(
            r.prompt.index,
            "\0".join(r.completions),
            {"rewards": None if r.rewards is None else r.rewards.tolist()},
        )
        for r in rollouts
    ]
    return fingerprint(rows)


# --- the work on one prompt ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What every prompt goes through: sampling, rewards, scores.

    Args:
        config: the options.
        policy: the policy.
        engine: what computes the scores' Gram matrix.
        grader: what gives the rewards.
        gamma_indices: the prompts at which the Jacobian norm is measured.
    """

    config: RftConfig
    policy: Policy
    engine: Engine
    grader: Grader
    gamma_indices: frozenset[int] = frozenset()

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        names = {f.name for f in dataclasses.fields(Sampling)} - {"seed"}
        return Sampling(**{name: getattr(self.config, name) for name in names}, seed=self.config.seed or 0)

    @property
    def support(self) -> Support:
        """What is known of the rewards: the option's range, else the grader's own."""
        given = self.config.reward_range
        return self.grader.support if given is None else Support(*given)

    def has_room(self, prompt: Prompt) -> bool:
        """Whether an answer fits after the prompt, within max_length and the model's positions."""
        reach = min(self.config.max_length, self.policy.max_positions or self.config.max_length)
        return (
            0 < len(prompt_tokens(self.policy.tokenizer, prompt)) <= reach - self.config.max_completion_length
        )

    def rollouts(self, prompts: Sequence[Prompt]) -> dict[int, Rollout]:
        """Sampled answers by prompt index; prompts without room are left out."""
        fitting = [prompt for prompt in prompts if self.has_room(prompt)]
        step = max(1, self.config.batch_size // self.config.num_generations)
        drawn = (
            sample_answers(self.policy, fitting[i : i + step], self.sampling)
            for i in range(0, len(fitting), step)
        )
        return {rollout.prompt.index: rollout for batch in drawn for rollout in batch}

    def row(self, prompt: Prompt, rollout: Rollout | None) -> dict[str, Any]:
        """One prompt's row: answers, rewards, log-probs and Gram matrix, or the flag that says why there are none."""
        description: dict[str, Any] = {"index": prompt.index, "prompt_hash": prompt.hash}
        if self.config.save_text:
            description["prompt"] = str(prompt.text)
        if rollout is None or rollout.is_empty:
            return (
                description | dict.fromkeys(FLAGS, False) | {"dropped" if rollout is None else "empty": True}
            )
        batch = rollout.collate(self.policy.pad_id).to(self.policy.device)
        logps = row_logps(self.policy.model, batch).cpu().numpy()
        reference = self.policy.reference.logps(batch)
        ref_logps = None if reference is None else reference.double().cpu().numpy()
        rewards = self._rewards(rollout, logps, ref_logps)
        gram = self.engine.gram(batch).double().cpu().numpy()
        numbers = np.concatenate([rewards, logps, gram.ravel()])
        row = description | dict.fromkeys(FLAGS, False) | {
            "non_finite": not bool(np.isfinite(numbers).all()),
            "prompt_length": min(map(len, rollout.prompt_ids)),
            "answers": len(rewards), "rewards": rewards.tolist(), "logps": logps.tolist(),
            "ref_logps": (np.full_like(logps, np.nan) if ref_logps is None else ref_logps).tolist(),
            "lengths": [len(ids) for ids in rollout.answer_ids], "finished": list(rollout.finished),
            "gram": gram.ravel().tolist(),
        }  # fmt: skip
        if prompt.index in self.gamma_indices:
            row["jacobian_norm"] = self._jacobian_norm(rollout)
        return row | ({"completions": list(rollout.completions)} if self.config.save_text else {})

    def _jacobian_norm(self, rollout: Rollout) -> float:
        """The Jacobian norm at a random token of a random answer, from below."""
        draw = np.random.default_rng([self.config.seed or 0, rollout.prompt.index])
        answer = int(draw.integers(len(rollout.answer_ids)))
        end = int(draw.integers(len(rollout.answer_ids[answer])))
        ids = torch.tensor(rollout.prompt_ids[answer] + rollout.answer_ids[answer][:end])
        return jacobian_norm(self.policy.model, self.policy.parameters, ids.to(self.policy.device))

    def _rewards(self, rollout: Rollout, logps: np.ndarray, ref_logps: np.ndarray | None) -> np.ndarray:
        prompt = rollout.prompt
        answers = AnswerSet(
            prompt.text, rollout.completions, prompt.columns, logps, ref_logps, rollout.rewards
        )
        rewards, support = self.grader(answers).astype(np.float64), self.support
        outside = support.is_known and ((rewards < support.low) | (rewards > support.high)).any()
        if outside or (support.is_binary and not np.isin(rewards, [support.low, support.high]).all()):
            raise GraderError(
                f"Prompt {prompt.index}: expected rewards in [{support.low}, {support.high}]; got {rewards.min()} to "
                f"{rewards.max()}. Give the true range with --reward_range."
            )
        return rewards


# --- the loop -----------------------------------------------------------------------------------------------


def _make_shard_folder(run: RunFolder) -> None:
    (run.path / FOLDER).mkdir(exist_ok=True)
    pairs = run.path / "pairs"  # every new run folder has one; here its shards are of answers
    if pairs.is_dir() and not any(pairs.iterdir()):
        pairs.rmdir()


def _compute(
    run: RunFolder, work: Work, shards: Sequence[tuple[Sequence[Prompt], Sequence[Rollout]]], console: Console
) -> None:
    """Write every shard that isn't there yet; on Ctrl-C, finish the one at hand and raise Interrupted."""
    done = {int(file.stem) for file in (run.path / FOLDER).glob("[0-9]*.parquet")}
    total = sum(len(prompts) for prompts, _ in shards)
    finished = sum(len(shards[number][0]) for number in done)
    if done:
        console.print(f"Resuming {run.path}: {finished} of {total} prompts are there.", markup=False)
    with progress_bar(console, "prompts", total, finished) as advance, deferred_interrupt() as interrupted:
        for number, (prompts, read) in enumerate(shards):
            if number in done:
                continue
            rows = _shard_rows(work, prompts, read, advance)
            run.write_table(f"{FOLDER}/{number:05d}.parquet", pd.DataFrame(rows))
            if interrupted():
                raise Interrupted(
                    f"Stopped; the finished shards are in {run.path}. "
                    f"Go on with: entangle rft --config {run.path / 'config.yaml'}"
                )


def _shard_rows(
    work: Work, prompts: Sequence[Prompt], read: Sequence[Rollout], advance: Callable[[int], None]
) -> Iterable[dict[str, Any]]:
    rollouts = {rollout.prompt.index: rollout for rollout in read} or work.rollouts(prompts)
    first = next((rollout for rollout in rollouts.values() if not rollout.is_empty), None)
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


def _finish(run: RunFolder, work: Work, console: Console, seconds: float) -> None:
    """Measure every prompt from the kept answers, and write what closes a run, its summary last."""
    rows, config = answer_rows(run), work.config
    gamma = _gamma(rows)
    used = rows[~rows[list(FLAGS)].any(axis=1)]
    lengths = [int(length) for entry in used["lengths"] for length in entry] if len(used) else [1]
    longest = config.max_completion_length if config.rollouts is None else max(lengths)
    setting = Setting(work.support, config.group_size, longest, gamma)
    prompts = prompt_rows(rows, setting)
    measured = prompts[~prompts[list(FLAGS)].any(axis=1)]
    summary: dict[str, Any] = {
        "prompts": {"total": len(prompts), "measured": len(measured)}
        | {flag: int(prompts[flag].sum()) for flag in FLAGS},
        "answers": int(measured["answers"].sum()) if len(measured) else 0,
        "setting": {"group_size": config.group_size, "max_length": longest, "gamma": gamma}
        | dataclasses.asdict(work.support),
    }
    if len(measured):
        thresholds = Thresholds.choose(measured, work.support, config.std_threshold, config.mean_threshold)
        summary |= summarise(measured, _equal_groups(used), work.support, thresholds)
    notes = [*work.policy.notes, *work.engine.notes, *_notes(work, gamma)]
    for note in notes:
        console.print(f"Note: {note}", markup=False)
    run.write_table("prompts.parquet", prompts)
    if config.plots and len(measured):
        _draw(run, measured, summary)
    run.write_json("provenance.json", environment() | dict(work.policy.description) | {
        "resolution": work.engine.resolution, "metric": "sgd", "engine": config.engine, "seconds": seconds,
        "reward": dataclasses.asdict(work.grader) | {"name": work.grader.name},  # pyright: ignore[reportArgumentType]
        "sampling": None if config.rollouts else dataclasses.asdict(work.sampling), "notes": notes,
    })  # fmt: skip
    run.write_json("summary.json", summary)


def prompt_rows(rows: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """The table prompts.parquet from the kept answers: a pure function of them."""
    kept = ("index", "prompt_hash", "prompt", *FLAGS, "prompt_length", "answers")
    table = []
    for row in rows.to_dict("records"):
        numbers = unmeasured() if any(row[flag] for flag in FLAGS) else measure(_named(row), setting)
        table.append({name: row[name] for name in kept if name in row} | numbers)
    return pd.DataFrame(table)


def _named(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in row.items()}


def _equal_groups(rows: pd.DataFrame) -> np.ndarray:
    """Rewards `(N, K)`, or `(0, 0)` where prompts have different numbers of answers."""
    if rows["answers"].nunique() != 1:
        return np.zeros((0, 0))
    return np.stack([np.asarray(entry, dtype=np.float64) for entry in rows["rewards"]])


def _gamma(rows: pd.DataFrame) -> float:
    """The largest Jacobian norm that was measured; NaN where none was."""
    return float(rows["jacobian_norm"].dropna().max()) if "jacobian_norm" in rows else math.nan


def _notes(work: Work, gamma: float) -> list[str]:
    notes = []
    if work.config.rollouts is None and not work.sampling.is_exact:
        notes.append(
            "Answers were drawn with temperature, top-k or top-p, so not from the policy itself: std and gradient are "
            "those under the sampled distribution (what a trainer with these settings follows)."
        )
    if work.config.rollouts is not None:
        notes.append("Answers come from a file: std and gradient are the policy's only if it drew them.")
    if not work.support.is_known:
        notes.append(
            "The rewards' range isn't known (--reward_range): certificates of ties and signal are left out."
        )
    if gamma == gamma:
        notes.append(
            "gamma is a lower estimate, so bounds with it (bound_paper, bound_length) aren't certified."
        )
    return notes


def _draw(run: RunFolder, prompts: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    from entangle.report import plots, rft_plots

    for name, draw in {"scatter": rft_plots.scatter, "map": rft_plots.reward_map}.items():
        plots.save(draw(plots.new_axes(), prompts, summary), run.path / f"{name}.png")
