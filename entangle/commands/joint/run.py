"""`entangle joint`: the same prompts and the same policy, DPO's signal beside RFT's.

preference pairs -> prompts -> K answers each -> rewards, log-probs, Gram matrix of answers and pair
                 (answers/00000.parquet, resumable) -> prompts.parquet, texts.parquet -> summary.json, figures

Under `accelerate launch` or `torchrun` the processes share the shards and write one folder.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from rich.console import Console, RenderableType

from entangle.commands.joint.table import joint_table, summarise_joint, with_states
from entangle.commands.probe import texts_of
from entangle.commands.rft.result import PromptsResult
from entangle.commands.rft.shards import answer_rows, compute_shards
from entangle.commands.rft.work import Work, measured_rows, reward_function_of, rollouts_fingerprint
from entangle.config import JointConfig, build_losses
from entangle.data import PreferencePair, fingerprint, tokenize_pair
from entangle.errors import ConfigError, DataError
from entangle.measure.inputs import load_pairs_of, load_policy_of
from entangle.models import Columns, NoReference, Policy
from entangle.rewards.rollouts import Prompt, Rollout, load_rollouts, prompts_of
from entangle.rewards.signals import Setting, Thresholds
from entangle.runs.folder import RunFolder
from entangle.runs.progress import notes_console
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
    processes = PartialState(cpu=not torch.cuda.is_available())
    console = notes_console(console, is_shown=processes.is_main_process)
    loss, reward_function = loss_of(config), reward_function_of(config)
    pairs = load_pairs_of(dataclasses.replace(config, limit=None))
    asked = prompts_of(pairs, config.limit, config.seed)
    policy = load_policy_of(config, processes)
    _check_reference(policy)
    read = _read_rollouts(config, policy, asked)
    prompts = [prompt for prompt, _ in asked.values()]
    if read:
        prompts = [rollout.prompt for rollout in read]
    chosen = {prompt.index: asked[prompt.index][1] for prompt in prompts}
    run = RunFolder(config.run_path)
    data = {"data": fingerprint(list(chosen.values())), "rollouts": rollouts_fingerprint(read)}
    with processes.main_process_first():
        run.begin(
            config, dict(policy.identity) | data, overwrite=config.overwrite and processes.is_main_process
        )  # fmt: skip
    if run.is_complete:
        console.print(f"{run.path} holds this run already; nothing to compute.", markup=False)
        return JointResult.load(run.path)
    started = time.monotonic()
    engine = make_engine(policy.model, policy.parameters, config.engine)
    tokenized = {
        index: tokenize_pair(policy.tokenizer, pair, config.max_length) for index, pair in chosen.items()
    }
    work = Work(config, policy, engine, reward_function, pairs=tokenized)
    compute_shards(run, work, prompts, read, console, processes)
    if processes.is_main_process:
        further = len(pairs) - len({pair.prompt_hash for pair in pairs})
        _finish(run, work, loss, chosen, further, console, time.monotonic() - started)
    processes.wait_for_everyone()
    return JointResult.load(run.path)


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
            "answers: an adapter, --ref_model_name_or_path, or --reference self (the policy is where training starts)."
        )


def _read_rollouts(
    config: JointConfig, policy: Policy, asked: Mapping[int, tuple[Prompt, PreferencePair]]
) -> list[Rollout]:
    """The answers of the rollouts file whose prompts have a pair, under the pairs' prompts; none without a file."""
    if config.rollouts is None:
        return []
    found = load_rollouts(config.rollouts, policy.tokenizer, max_length=config.max_length)
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


def _finish(
    run: RunFolder, work: Work, loss: PreferenceLoss, pairs: Mapping[int, PreferencePair], further: int,
    console: Console, seconds: float,
) -> None:  # fmt: skip
    """Measure every prompt from the kept rows, and write what closes a run, its summary last."""
    rows, config = answer_rows(run), work.config
    assert isinstance(config, JointConfig)
    prompts = joint_table(rows, loss, Setting(work.support, config.group_size), work.engine.resolution)
    measured = measured_rows(prompts)
    summary = work.answer_summary(rows) | {
        "loss": loss.label,
        "setting": {"group_size": config.group_size} | dataclasses.asdict(work.support),
    }
    if len(measured):
        thresholds = Thresholds.choose(measured, work.support, config.std_threshold, config.mean_threshold)
        measured = with_states(measured, thresholds, config.std_threshold, config.signal_threshold)
        states = measured[["index", *(name for name in measured if name not in prompts)]]
        prompts = prompts.merge(states, on="index", how="left")
        limits = dataclasses.asdict(thresholds) | {
            "signal": config.signal_threshold, "rft_signal": config.std_threshold,
        }  # fmt: skip
        summary |= {"thresholds": limits} | summarise_joint(measured, thresholds)
    notes = work.notes(summary) + (
        [f"{further} pairs of the data set have the prompt of an earlier one and were left out."]
        if further
        else []
    )
    for note in notes:
        console.print(f"Note: {note}", markup=False)
    run.write_table("prompts.parquet", prompts)
    if config.save_text and len(measured):
        run.write_table("texts.parquet", _texts(rows, measured, pairs))
    if config.plots and len(measured):
        _draw(run, measured, summary)
    run.write_json("provenance.json", work.provenance(notes, seconds) | {"loss": loss.label})
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
