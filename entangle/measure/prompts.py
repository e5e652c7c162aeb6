"""What every prompt goes through: answers, rewards, log-probs and scores, as one row of numbers.

Shared by `entangle rft` and `entangle joint`, which also has a preference pair to each prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from entangle.config import EMBEDDED, JointConfig, RftConfig
from entangle.data import TokenizedPair
from entangle.measure.group_sums import PromptSums
from entangle.models import Policy, check_reference
from entangle.rewards.functions import AnswerSet, FromFile, RewardError, RewardFunction, build_reward_function
from entangle.rewards.rollouts import Prompt, Rollout, Sampling, hash_prompts, prompt_tokens, sample_answers
from entangle.rewards.statistics import Support, cut_answers
from entangle.rewards.steps import Group
from entangle.runs.provenance import environment
from entangle.runs.session import Session
from entangle.scores import Engine, row_logps
from entangle.scores.jacobian import jacobian_norm

ANSWERS = "answers"
"""The folder of shards: one row per prompt."""

FURTHER = "reward by "
"""Before the label of a further reward function: the column of its rewards."""

FLAGS = ("dropped", "empty", "non_finite")
"""Why a prompt has no numbers: it leaves no room for an answer; an answer or a response has no token; a reward or
score isn't a number."""


def reward_function_of(config: RftConfig | JointConfig) -> RewardFunction:
    """The reward that the options name: by default the file's own with a rollouts file, else ROUGE-L."""
    default = FromFile.name if config.rollouts else "rouge_l"
    return build_reward_function(default if config.reward is None else config.reward)


def hash_rollouts(rollouts: Sequence[Rollout]) -> str | None:
    """The sha256 over answers that were read and their rewards; None if none was."""
    if not rollouts:
        return None
    rows = [
        Prompt(
            r.prompt.index,
            "\0".join(r.completions),
            {"rewards": None if r.rewards is None else r.rewards.tolist()}
            | {name: values.tolist() for name, values in r.parts.items()},
        )
        for r in rollouts
    ]
    return hash_prompts(rows)


def measured_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The prompts that have numbers."""
    return table[~table[list(FLAGS)].any(axis=1)]


@dataclass(frozen=True)
class PromptMeasurement:
    """What every prompt goes through: sampling, rewards and scores.

    Args:
        config: the options.
        policy: the policy.
        engine: what computes the scores' Gram matrix.
        reward_function: what gives the rewards.
        gamma_indices: the prompts at which the Jacobian norm is measured.
        pairs: by prompt index, a preference pair whose responses are scored together with the answers.
        told: notes on the data that were told before, kept with the run.
        further: reward functions that are compared with the first one, by label.
        sums: where the scores of prompts with rewards that differ are added up; None: nowhere.
    """

    config: RftConfig | JointConfig
    policy: Policy
    engine: Engine
    reward_function: RewardFunction
    gamma_indices: frozenset[int] = frozenset()
    pairs: Mapping[int, TokenizedPair] = field(default_factory=dict)
    told: Sequence[str] = ()
    further: Mapping[str, RewardFunction] = field(default_factory=dict)
    sums: PromptSums | None = None

    @property
    def sampling(self) -> Sampling:
        """How answers are drawn."""
        names = {f.name for f in dataclasses.fields(Sampling)} - {"seed"}
        return Sampling(**{name: getattr(self.config, name) for name in names}, seed=self.config.seed or 0)

    @property
    def support(self) -> Support:
        """What is known of the rewards: the option's range, else the reward function's own."""
        given = self.config.reward_range
        return self.reward_function.support if given is None else Support(*given)

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
        """One prompt's row: answers, rewards, log-probs and Gram matrix, or the flag that says why there are none.

        With a pair, also the log-probs of its two responses and their dot products with the answers, the
        chosen and the rejected (pair_gram, `(2, K + 2)`).
        """
        pair = self.pairs.get(prompt.index)
        row: dict[str, Any] = {"index": prompt.index, "prompt_hash": prompt.hash} | dict.fromkeys(
            FLAGS, False
        )
        if self.config.save_text:
            row["prompt"] = str(prompt.text)
        if rollout is None or (pair is not None and pair.dropped):
            return row | {"dropped": True}
        if rollout.is_empty or (pair is not None and pair.empty):
            return row | {"empty": True}
        batch = rollout.collate(self.policy.pad_id, pair).to(self.policy.device)
        logps = row_logps(self.policy.model, batch).cpu().numpy()
        reference = self.policy.reference.logps(batch)
        ref_logps = np.full_like(logps, np.nan) if reference is None else reference.double().cpu().numpy()
        count = len(rollout.answer_ids)
        answers = self._answers(rollout, logps[:count], None if reference is None else ref_logps[:count])
        rewards = self._rewards(answers, prompt)
        gram = self.engine.gram(batch).double().cpu().numpy()
        is_finite = bool(np.isfinite(np.concatenate([rewards, logps, gram.ravel()])).all())
        if self.sums is not None and is_finite:
            lengths = np.array([len(ids) for ids in rollout.answer_ids], dtype=np.float64)
            self.sums.add(prompt, batch, Group(rewards, lengths, np.array(rollout.finished, dtype=bool)))
        row |= {
            "non_finite": not is_finite,
            "prompt_length": min(map(len, rollout.prompt_ids)),
            "answers": count,
            "rewards": rewards.tolist(),
            "logps": logps[:count].tolist(),
            "ref_logps": ref_logps[:count].tolist(),
            "lengths": [len(ids) for ids in rollout.answer_ids],
            "finished": list(rollout.finished),
            "gram": gram[:count, :count].ravel().tolist(),
        }
        if pair is not None:
            row |= {
                "pair_logps": logps[count:].tolist(),
                "pair_ref_logps": ref_logps[count:].tolist(),
                "pair_lengths": [len(pair.chosen_ids), len(pair.rejected_ids)],
                "pair_truncated": pair.truncated,
                "pair_identical": pair.identical,
                "pair_gram": gram[count:].ravel().tolist(),
            }
        for label, function in self.further.items():
            row[f"{FURTHER}{label}"] = function(answers).astype(np.float64).tolist()
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

    def _answers(self, rollout: Rollout, logps: np.ndarray, ref_logps: np.ndarray | None) -> AnswerSet:
        prompt = rollout.prompt
        return AnswerSet(
            prompt.text, rollout.completions, prompt.columns, logps, ref_logps, rollout.rewards, rollout.parts
        )

    def _rewards(self, answers: AnswerSet, prompt: Prompt) -> np.ndarray:
        rewards, support = self.reward_function(answers).astype(np.float64), self.support
        outside = support.is_known and ((rewards < support.low) | (rewards > support.high)).any()
        if outside or (support.is_binary and not np.isin(rewards, [support.low, support.high]).all()):
            raise RewardError(
                f"Prompt {prompt.index}: expected rewards in [{support.low}, {support.high}]; got {rewards.min()} to "
                f"{rewards.max()}. Give the true range with --reward_range."
            )
        return rewards

    # --- what a run says of its answers ---------------------------------------------------------------------

    def answer_summary(self, rows: pd.DataFrame) -> dict[str, Any]:
        """Counts of prompts and answers, and the answers that were cut, from the kept rows."""
        measured = measured_rows(rows)
        summary: dict[str, Any] = {
            "prompts": {"total": len(rows), "measured": len(measured)}
            | {f: int(rows[f].sum()) for f in FLAGS},
            "answers": int(measured["answers"].sum()) if len(measured) else 0,
        }
        if len(measured):
            summary["cut"] = cut_answers(list(measured["finished"]), list(measured["rewards"]))
        return summary

    def notes(self, summary: Mapping[str, Any]) -> list[str]:
        """What the reader of the numbers should know of policy, engine and answers."""
        notes = [*self.policy.notes, *self.engine.notes]
        if self.config.rollouts is not None:
            notes.append("Answers come from a file: std and gradient are the policy's only if it drew them.")
        elif not self.sampling.is_exact:
            notes.append(
                "Answers were drawn with temperature, top-k or top-p, so not from the policy itself: std and gradient "
                "are those under the sampled distribution (what a trainer with these settings follows)."
            )
        cut = summary.get("cut", {"count": 0})
        if cut["count"]:
            limit = "max_length" if self.config.rollouts else f"{self.config.max_completion_length} tokens"
            notes.append(
                f"{100 * cut['share']:.0f} % of the answers were cut at {limit}: their rewards are those of "
                "beginnings, and their scores hold no end of sequence. Raise the limit if this share is large."
            )
        if not self.support.is_known:
            notes.append(
                "The rewards' range isn't known (--reward_range): certificates of ties and signal are left out."
            )
        return notes

    def provenance(self, notes: Sequence[str], seconds: float) -> dict[str, Any]:
        """What the numbers were computed from and on."""
        own = {}
        if self.config.model_name_or_path == EMBEDDED:  # not the place where this installation keeps it
            own["model_name_or_path"] = EMBEDDED
            if self.policy.description["adapter_name_or_path"] and self.config.adapter_name_or_path is None:
                own["adapter_name_or_path"] = EMBEDDED
        return (
            environment()
            | dict(self.policy.description)
            | own
            | {
                "dataset_name": self.config.rollouts or self.config.dataset_name,
                "resolution": self.engine.resolution,
                "metric": "sgd",
                "engine": self.config.engine,
                "seconds": seconds,
                "reward": dataclasses.asdict(self.reward_function) | {"name": self.reward_function.name},  # pyright: ignore[reportArgumentType]
                "sampling": None if self.config.rollouts else dataclasses.asdict(self.sampling),
                "notes": [*self.told, *notes],
            }
        )


def compute_answers(
    session: Session, measurement: PromptMeasurement, prompts: Sequence[Prompt], read: Sequence[Rollout]
) -> None:
    """Write every shard of answers that isn't there yet (see `Session.compute`).

    Args:
        session: the command at work.
        measurement: what makes a row of a prompt.
        prompts: all prompts, in their order.
        read: answers that were read; none: they are sampled.
    """
    size, rollouts = measurement.config.shard_size, {rollout.prompt.index: rollout for rollout in read}
    shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    sums = None if measurement.sums is None else measurement.sums.sums

    def tables_of(number: int, advance: Callable[[int], None]) -> dict[str, pd.DataFrame]:
        if sums is not None:
            sums.start(number)
        return {ANSWERS: _shard_rows(measurement, shards[number], rollouts, advance)}

    session.compute(ANSWERS, list(map(len, shards)), tables_of, unit="prompts", further=sums)


def rollouts_again(
    measurement: PromptMeasurement, prompts: Sequence[Prompt], read: Sequence[Rollout], wanted: Sequence[int]
) -> dict[int, Rollout]:
    """The answers to some prompts, read or drawn as they were drawn before: by their shards.

    Args:
        measurement: what makes a row of a prompt.
        prompts: all prompts, in their order.
        read: answers that were read; none: they are sampled.
        wanted: indices of prompts.
    """
    if read:
        return {r.prompt.index: r for r in read if r.prompt.index in wanted}
    size = measurement.config.shard_size
    found: dict[int, Rollout] = {}
    for start in range(0, len(prompts), size):
        shard = prompts[start : start + size]
        if any(prompt.index in wanted for prompt in shard):
            found |= measurement.rollouts(shard)
    return {index: found[index] for index in wanted}


def _shard_rows(
    measurement: PromptMeasurement,
    prompts: Sequence[Prompt],
    read: Mapping[int, Rollout],
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """The rows of a shard's prompts.

    What is drawn for a prompt depends on the options and on its shard, not on the process or on what was computed
    before.

    Args:
        measurement: what makes a row of a prompt.
        prompts: the shard's prompts.
        read: answers that were read, by prompt index; none: they are sampled.
        advance: told of every prompt.
    """
    rollouts = read or measurement.rollouts(prompts)
    first = next((r for p in prompts if (r := rollouts.get(p.index)) is not None and not r.is_empty), None)
    if first is not None:
        policy = measurement.policy
        check_reference(policy, first.collate(policy.pad_id).to(policy.device))
    rows = []
    for prompt in prompts:
        rows.append(measurement.row(prompt, rollouts.get(prompt.index)))
        advance(1)
    return pd.DataFrame(rows)
