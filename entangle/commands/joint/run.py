"""`entangle joint`: the same prompts and the same policy, DPO's signal beside RFT's.

preference pairs -> prompts -> K answers each -> rewards, log-probs, Gram matrix of answers and pair
                 (answers/00000.parquet, resumable) -> prompts.parquet, texts.parquet -> summary.json, figures

Under `accelerate launch` or `torchrun` the processes share the shards and write one folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console, RenderableType

from entangle.commands.joint.table import joint_table, summarise_joint, with_states
from entangle.commands.rft.result import PromptsResult
from entangle.config import JointConfig, build_losses
from entangle.data import PreferencePair, hash_pairs
from entangle.errors import ConfigError, DataError
from entangle.measure.inputs import load_policy_of, read_pairs_of
from entangle.measure.plan import extremes
from entangle.measure.prompts import (
    ANSWERS,
    PromptMeasurement,
    compute_answers,
    hash_rollouts,
    measured_rows,
    reward_function_of,
)
from entangle.measure.rows import texts_of
from entangle.models import Columns, NoReference, Policy, settle_reference
from entangle.rewards.functions import FromFile, RewardFunction
from entangle.rewards.recorded import read_recorded
from entangle.rewards.rollouts import Prompt, Rollout, prompts_of
from entangle.rewards.signals import Setting
from entangle.rewards.summary import Thresholds
from entangle.runs.folder import RunFolder
from entangle.runs.session import Session
from entangle.scores import make_engine
from entangle.tables.joint import joint_tables
from losses import PreferenceLoss


@dataclass(frozen=True)
class JointResult(PromptsResult):
    """A finished run (see `PromptsResult`)."""

    VERB = JointConfig.VERB

    def renderable(self) -> RenderableType:
        """The tables as rich objects: signals, reasons, correlations, angles, and the most telling prompts."""
        provenance, texts = self.run.read_json("provenance.json"), self.run.table("texts.parquet")
        return joint_tables(self.summary, provenance, measured_rows(self.prompts), texts)


def run_joint(config: JointConfig, console: Console | None = None) -> JointResult:
    """Measure on every prompt what its preference pair and what rewards of sampled answers would teach.

    A prompt's first pair in the data set is scored together with K answers of the policy, so that one Gram matrix
    holds both methods' steps. A run that was broken off is resumed.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: an option, the data, the model, the reward or the run folder can't be used.
        Interrupted: Ctrl-C; the shard at hand is finished first.
    """
    session = Session.start(config, console)
    loss, reward_function = loss_of(config), reward_function_of(config)
    data = read_pairs_of(dataclasses.replace(config, limit=None))
    pairs = data.pairs
    asked = prompts_of(pairs, config.limit, config.seed)
    policy = settle_reference(load_policy_of(config, session.processes), pairs)
    _check_reference(policy)
    read = _read_rollouts(config, policy, reward_function, asked, session)
    prompts = [rollout.prompt for rollout in read] or [prompt for prompt, _ in asked.values()]
    chosen = {prompt.index: asked[prompt.index][1] for prompt in prompts}
    identity = {"data": hash_pairs(list(chosen.values())), "rollouts": hash_rollouts(read)}
    if not session.begin(dict(policy.identity) | identity):
        return JointResult.load(session.run.path)
    engine = make_engine(policy.model, policy.parameters, config.engine)
    done = policy.tokenize(list(chosen.values()), config.max_length)
    tokenized = dict(zip(chosen, done.tokens, strict=True))
    told = (*data.notes, *done.notes)
    for note in told:
        session.note(note)
    if ends := extremes(done.tokens):
        engine.check(policy.collate(ends))
    measurement = PromptMeasurement(config, policy, engine, reward_function, pairs=tokenized, told=told)
    compute_answers(session, measurement, prompts, read)
    further = len(pairs) - len({pair.prompt_hash for pair in pairs})
    return JointResult.load(session.finish(lambda: _close(session, measurement, loss, chosen, further)))


def loss_of(config: JointConfig) -> PreferenceLoss:
    """The loss that is compared.

    Raises:
        ConfigError: its incentives need more than a pair's own log-probs.
    """
    (loss,) = build_losses(config.losses)
    reason = (
        "weighs tokens"
        if loss.needs_tokens
        else "reads the rest of a batch"
        if loss.is_batch_coupled
        else None
    )
    if reason:
        raise ConfigError(
            f"{loss.label} {reason}; joint needs a loss that reads one pair's log-probs, such as dpo."
        )
    return loss


def _check_reference(policy: Policy) -> None:
    if isinstance(policy.reference, Columns | NoReference):
        raise ConfigError(
            "joint compares with the start of a preference training, so it needs a reference that can score sampled "
            "answers: an adapter, --ref_model_name_or_path, or --reference self (the policy is where training starts); "
            "log-probs in columns of the data set, or none, won't do."
        )


def _read_rollouts(
    config: JointConfig,
    policy: Policy,
    reward: RewardFunction,
    asked: Mapping[int, tuple[Prompt, PreferencePair]],
    session: Session,
) -> list[Rollout]:
    """The answers of the rollouts file whose prompts have a pair, under the pairs' prompts; none without a file."""
    if config.rollouts is None:
        return []
    from_file = isinstance(reward, FromFile)
    recorded = read_recorded(
        config.rollouts,
        policy.tokenizer,
        max_length=config.max_length,
        reward=reward.column if from_file else "",
        needs_rewards=from_file,
        step=config.rollouts_step,
    )
    for note in recorded.notes:
        session.note(note)
    found = recorded.rollouts
    by_hash = {rollout.prompt.hash: rollout for rollout in found}
    read = [
        dataclasses.replace(by_hash[prompt.hash], prompt=prompt)
        for prompt, _ in asked.values()
        if prompt.hash in by_hash
    ]
    if not read:
        raise DataError(
            f"No prompt of {config.rollouts} ({len(found)} prompts) has a pair in {config.dataset_name}. Expected the "
            "same prompts, character by character."
        )
    return read


def _close(
    session: Session,
    measurement: PromptMeasurement,
    loss: PreferenceLoss,
    pairs: Mapping[int, PreferencePair],
    further: int,
) -> None:
    """Measure every prompt from the kept rows, and write what closes a run, its summary last."""
    run, config, seconds = session.run, measurement.config, session.seconds
    rows = run.read_shards(ANSWERS)
    assert isinstance(config, JointConfig)
    prompts = joint_table(
        rows, loss, Setting(measurement.support, config.group_size), measurement.engine.resolution
    )
    measured = measured_rows(prompts)
    summary = measurement.answer_summary(rows) | {
        "loss": loss.label,
        "setting": {"group_size": config.group_size} | dataclasses.asdict(measurement.support),
    }
    if len(measured):
        thresholds = Thresholds.choose(
            measured, measurement.support, config.std_threshold, config.mean_threshold
        )
        measured = with_states(measured, thresholds, config.std_threshold, config.signal_threshold)
        states = measured[["index", *(name for name in measured if name not in prompts)]]
        prompts = prompts.merge(states, on="index", how="left")
        limits = dataclasses.asdict(thresholds) | {
            "signal": config.signal_threshold,
            "rft_signal": config.std_threshold,
        }
        summary |= {"thresholds": limits} | summarise_joint(measured, thresholds)
    notes = measurement.notes(summary) + (
        [f"{further} pairs of the data set have the prompt of an earlier one and were left out."]
        if further
        else []
    )
    for note in notes:
        session.note(note)
    run.write_table("prompts.parquet", prompts)
    if config.save_text and len(measured):
        run.write_table("texts.parquet", _texts(rows, measured, pairs))
    if config.plots and len(measured):
        _draw(run, measured, summary)
    run.write_json("provenance.json", measurement.provenance(notes, seconds) | {"loss": loss.label})
    run.write_json("summary.json", summary)


def _texts(rows: pd.DataFrame, measured: pd.DataFrame, pairs: Mapping[int, PreferencePair]) -> pd.DataFrame:
    """index, prompt, chosen, rejected, best and worst answer; the answers empty where rewards tie."""
    completions = dict(zip(rows["index"], rows["completions"], strict=True))
    answers = []
    for index, *places in measured[["index", "best_chosen_answer", "best_rejected_answer"]].itertuples(
        index=False
    ):
        answers.append(
            [index, *("" if place != place else completions[index][int(place)] for place in places)]
        )
    texts = texts_of([pairs[index] for index in measured["index"]])
    return texts.merge(pd.DataFrame(answers, columns=["index", "best", "worst"]), on="index")


def _draw(run: RunFolder, prompts: pd.DataFrame, summary: Mapping[str, Any]) -> None:
    from entangle.figures.signals import entanglement, quadrants
    from entangle.figures.style import new_axes, save

    for name, draw in {"quadrants": quadrants, "entanglement": entanglement}.items():
        save(draw(new_axes(), prompts, summary), run.path / f"{name}.png")
