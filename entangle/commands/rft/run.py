"""`entangle rft`: does a policy's reward vary within a prompt, and what gradient does that leave?

prompts -> K answers each -> rewards, log-probs, Gram matrix (answers/00000.parquet, resumable)
        -> signals (prompts.parquet) -> summary.json, figures

Under `accelerate launch` or `torchrun` the processes share the shards and write one folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console, RenderableType

from entangle.commands.rft.groups import GroupTables, steps_of, tables_to_write
from entangle.commands.rft.result import PromptsResult
from entangle.config import RftConfig
from entangle.errors import ConfigError
from entangle.measure.group_sums import NO_SUMS, PromptSums
from entangle.measure.group_tokens import group_tokens
from entangle.measure.group_verification import summarise_groups, verify_groups
from entangle.measure.inputs import load_policy_of
from entangle.measure.prompts import (
    ANSWERS,
    FLAGS,
    FURTHER,
    PromptMeasurement,
    compute_answers,
    hash_rollouts,
    measured_rows,
    reward_function_of,
    rollouts_again,
)
from entangle.measure.verification import sample_indices
from entangle.models import Policy
from entangle.rewards.functions import FromFile, RewardFunction, build_reward_function, reward_label
from entangle.rewards.group_size import group_sizes
from entangle.rewards.groups import Groups
from entangle.rewards.recorded import Recorded, read_recorded
from entangle.rewards.rollouts import Prompt, Rollout, hash_prompts, load_prompts
from entangle.rewards.several import compare_rewards
from entangle.rewards.signals import Setting, measure, unmeasured
from entangle.rewards.summary import Thresholds, summarise
from entangle.runs.folder import RunFolder
from entangle.runs.progress import progress_bar
from entangle.runs.session import Session
from entangle.scores import make_engine
from entangle.tables.rft import reward_tables

TOKENS_SHOWN = 12
"""Of all tokens that were looked at, those that the summary names."""


@dataclass(frozen=True)
class RftResult(PromptsResult):
    """A finished run (see `PromptsResult`)."""

    VERB = RftConfig.VERB

    def renderable(self, worst: int = 3) -> RenderableType:
        """The tables as rich objects: prevalence, distributions, gradients, and the `worst` prompts."""
        return reward_tables(self.summary, self.run.read_json("provenance.json"), self.prompts, worst)


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
    session = Session.start(config, console)
    reward_function = reward_function_of(config)
    prompts = _load_prompts(config) if config.rollouts is None else []
    policy = load_policy_of(config, session.processes)
    further = further_rewards_of(config, reward_function)
    recorded = read_rollouts(config, policy, reward_function, further.values())
    read = recorded.rollouts
    for note in recorded.notes:
        session.note(note)
    prompts = prompts or [rollout.prompt for rollout in read]
    identity = dict(policy.identity) | {"data": hash_prompts(prompts), "rollouts": hash_rollouts(read)}
    if not session.begin(identity):
        return RftResult.load(session.run.path)
    engine = make_engine(policy.model, policy.parameters, config.engine)
    gamma_indices = frozenset(prompt.index for prompt in prompts[: config.gamma_positions])
    sums = None
    if config.across:
        process = session.processes.process_index
        sums = PromptSums.over(session.run, policy, engine, prompts, steps_of(config), process=process)
    measurement = PromptMeasurement(
        config,
        policy,
        engine,
        reward_function,
        gamma_indices,
        told=recorded.notes,
        further=further,
        sums=sums,
    )
    compute_answers(session, measurement, prompts, read)
    again = partial(rollouts_again, measurement, prompts, read)
    return RftResult.load(session.finish(lambda: _close(session, measurement, again, recorded.history)))


def _load_prompts(config: RftConfig) -> list[Prompt]:
    columns = config.column_map
    unknown = sorted(set(columns) - {"prompt"})
    if unknown:
        raise ConfigError(
            f"--columns names the prompt column here (prompt=NAME); got {unknown[0]!r}. A reference text is named by "
            "its reward, as rouge_l:reference=NAME."
        )
    if config.format not in ("auto", "trl"):
        raise ConfigError(
            f"--format {config.format} reads pairs; here only prompts are needed, from one column: --columns "
            "prompt=NAME."
        )
    return load_prompts(
        config.dataset_place,
        split=config.dataset_train_split,
        config=config.dataset_config,
        column=columns.get("prompt", "prompt"),
        limit=config.limit,
        seed=config.seed,
    )


def further_rewards_of(config: RftConfig, reward: RewardFunction) -> dict[str, RewardFunction]:
    """The functions that are compared with the reward, by label: those asked for, and the parts of a sum of columns."""
    found = [build_reward_function(spec) for spec in config.further_rewards]
    if isinstance(reward, FromFile) and "+" in reward.column:
        found = [FromFile(name.strip()) for name in reward.column.split("+")] + found
    return {reward_label(function): function for function in found}


def read_rollouts(
    config: RftConfig, policy: Policy, reward: RewardFunction, further: Iterable[RewardFunction] = ()
) -> Recorded:
    """The answers of the rollouts file, with the columns that --columns names; none without one."""
    if config.rollouts is None:
        return Recorded([])
    from_file = isinstance(reward, FromFile)
    parts = reward.column.split("+") if from_file else []
    columns = [function.column for function in further if isinstance(function, FromFile)]
    return read_recorded(
        config.rollouts,
        policy.tokenizer,
        max_length=config.max_length,
        limit=config.limit,
        columns=config.column_map,
        reward=reward.column if from_file else "",
        needs_rewards=from_file,
        step=config.rollouts_step,
        further=[name for name in columns if name not in map(str.strip, parts) or len(parts) == 1],
    )


def _close(
    session: Session,
    measurement: PromptMeasurement,
    again: Callable[[Sequence[int]], dict[int, Rollout]],
    history: pd.DataFrame,
) -> None:
    """Measure every prompt from the kept answers, and write what closes a run, its summary last."""
    run, config, seconds = session.run, measurement.config, session.seconds
    rows = run.read_shards(ANSWERS)
    assert isinstance(config, RftConfig)
    gamma = _gamma(rows)
    used = measured_rows(rows)
    lengths = [int(length) for entry in used["lengths"] for length in entry] if len(used) else [1]
    longest = config.max_completion_length if config.rollouts is None else max(lengths)
    prompts = prompt_rows(rows, Setting(measurement.support, config.group_size, longest, gamma))
    measured = measured_rows(prompts)
    summary = measurement.answer_summary(rows) | {
        "setting": {"group_size": config.group_size, "max_length": longest, "gamma": gamma}
        | dataclasses.asdict(measurement.support),
    }
    if len(measured):
        thresholds = Thresholds.choose(
            measured, measurement.support, config.std_threshold, config.mean_threshold
        )
        summary |= summarise(measured, _equal_groups(used), measurement.support, thresholds)
        groups = Groups.of(
            used, steps_of(config), measurement.support, longest, measurement.engine.resolution
        )
        tables = GroupTables.of(groups, measurement.sums)
        summary["groups"] = tables.summary
        summary["group_sizes"] = group_sizes(
            [p.gram for p in groups.prompts], [p.group.rewards for p in groups.prompts]
        )
        if measurement.further:
            summary["rewards"] = _compare(measurement, used)
        if config.tokens and groups.mixed:
            tokens = _tokens(measurement, groups, tables.moves, again)
            run.write_table("tokens.parquet", tokens if config.save_text else tokens.drop(columns="token"))
            if config.save_text:
                summary["groups"]["tokens"] = tokens.nlargest(TOKENS_SHOWN, "product").to_dict("records")
        if config.verify:
            checked = _verify(session, measurement, groups, again)
            run.write_table("steps.parquet", checked)
            summary["groups"]["verification"] = summarise_groups(checked)
        for name, table in tables_to_write(tables).items():
            run.write_table(name, table)
    if len(history):
        run.write_table("history.parquet", history)
        summary["history"] = history.to_dict("records")
    notes = measurement.notes(summary)
    if config.across and len(measured) and summary["groups"]["others"] is None:
        notes.append(NO_SUMS)
    if gamma == gamma:
        notes.append(
            "gamma is a lower estimate, so bounds with it (bound_paper, bound_length) aren't certified."
        )
    for note in notes:
        session.note(note)
    run.write_table("prompts.parquet", prompts)
    if config.plots and len(measured):
        _draw(run, measured, summary)
    run.write_json("provenance.json", measurement.provenance(notes, seconds))
    if measurement.sums is not None:
        measurement.sums.sums.remove()
    run.write_json("summary.json", summary)


def _compare(measurement: PromptMeasurement, used: pd.DataFrame) -> dict[str, Any]:
    """The reward and the further ones beside each other."""
    main = reward_label(measurement.reward_function)
    columns = {main: "rewards"} | {label: f"{FURTHER}{label}" for label in measurement.further}
    found = {
        label: [np.asarray(entry, dtype=np.float64) for entry in used[column]]
        for label, column in columns.items()
    }
    return compare_rewards(found, main)


def _tokens(
    measurement: PromptMeasurement,
    groups: Groups,
    moves: pd.DataFrame,
    again: Callable[[Sequence[int]], dict[int, Rollout]],
) -> pd.DataFrame:
    """Tokens of the incorrect answers to the prompts whose correct answers lose most to these, under the first step."""
    config = measurement.config
    assert isinstance(config, RftConfig)
    first = moves[moves["step"] == next(iter(groups.steps))]
    wanted = first.nsmallest(config.tokens, "correct_by_incorrect")["index"].tolist()
    by_index, rollouts = {prompt.index: prompt for prompt in groups.mixed}, again(wanted)
    found = [group_tokens(measurement.policy, by_index[index], rollouts[index]) for index in wanted]
    return pd.concat(found, ignore_index=True)


def _verify(
    session: Session,
    measurement: PromptMeasurement,
    groups: Groups,
    again: Callable[[Sequence[int]], dict[int, Rollout]],
) -> pd.DataFrame:
    """Real steps on the groups of as many mixed prompts as were asked for."""
    config = measurement.config
    assert isinstance(config, RftConfig)
    by_index = {prompt.index: prompt for prompt in groups.mixed}
    wanted = sample_indices(sorted(by_index), config.verify)
    rollouts = again(wanted)
    with progress_bar(session.console, "real steps", len(wanted) * len(groups.steps), 0) as advance:
        return verify_groups(
            measurement.policy,
            [(by_index[index], rollouts[index]) for index in wanted],
            groups.steps,
            groups.max_completion_length,
            groups.resolution,
            advance,
        )


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


def _draw(run: RunFolder, prompts: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    from entangle.figures.rewards import reward_map, scatter
    from entangle.figures.style import new_axes, save

    for name, draw in {"scatter": scatter, "map": reward_map}.items():
        save(draw(new_axes(), prompts, summary), run.path / f"{name}.png")
