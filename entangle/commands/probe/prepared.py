"""What a probe has before its first pass: a policy with its reference, token ids, losses, all of it checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from entangle.analysis.predictions import check_labels, usable_losses
from entangle.config import ProbeConfig
from entangle.data import PreferencePair, TokenizedPair
from entangle.diagnostics import resolve
from entangle.errors import ConfigError
from entangle.measure.passes import Measurement, Summing, column_functions
from entangle.measure.plan import Plan, extremes, is_scorable, longest
from entangle.measure.rows import ROW_COLUMNS
from entangle.models import AdamState, NoReference, Policy, check_positions, check_reference, settle_reference
from entangle.scores import Metric, make_engine
from losses import PreferenceLoss


@dataclass(frozen=True)
class Prepared:
    """A probe that can begin.

    Args:
        options: how pairs are measured and judged; where model, data and run folder are isn't read.
        losses: those to be judged.
        are_named: whether the user named them, so that one that can't be judged is an error.
        policy: with its reference settled.
        pairs: the pairs that could be used.
        tokens: the same as token ids.
        notes: what the reader of the numbers should know.
        metric: the optimiser's diagonal metric; None is SGD's.
    """

    options: ProbeConfig
    losses: Sequence[PreferenceLoss]
    are_named: bool
    policy: Policy
    pairs: Sequence[PreferencePair]
    tokens: Sequence[TokenizedPair]
    notes: tuple[str, ...]
    metric: Metric | None = None

    @classmethod
    def make(
        cls,
        options: ProbeConfig,
        losses: Sequence[PreferenceLoss],
        are_named: bool,
        policy: Policy,
        pairs: Sequence[PreferencePair],
    ) -> Prepared:
        """Tokenise, settle the reference, and refuse what would be measured in vain.

        Args:
            options: how pairs are measured.
            losses: those to be judged.
            are_named: whether the user named them.
            policy: the model.
            pairs: the pairs.

        Raises:
            UserError: a named loss can't be judged, a pair can't be used, or positions don't reach.
        """
        taken = policy.tokenize(pairs, options.max_length, skip_invalid=options.skip_invalid)
        policy = settle_reference(policy, taken.pairs)
        if isinstance(policy.reference, NoReference):
            judgeable(losses, are_named, has_reference=False)
        reach = max(map(longest, filter(is_scorable, taken.tokens)), default=0)
        notes = (*taken.notes, *policy.notes, *check_positions(policy.model, reach))
        return cls(options, losses, are_named, policy, taken.pairs, taken.tokens, notes)

    def under(self, state: AdamState) -> Prepared:
        """The same in the metric of an optimiser's state."""
        note = (
            "Scores are compared, and changes predicted to first order, under AdamW's preconditioner frozen after "
            f"{state.step} updates; a change is per unit of learning rate, without momentum and weight decay."
        )
        return dataclasses.replace(
            self, metric=state.metric(self.policy.parameters), notes=(*self.notes, note)
        )

    @property
    def metric_name(self) -> str:
        """`sgd`, or `adamw`."""
        return "sgd" if self.metric is None else "adamw"

    @property
    def plan(self) -> Plan:
        """The pairs in the order in which they are computed."""
        return Plan.make(self.tokens, self.options.shard_size, self.options.batch_size)

    def measurement(self, plan: Plan, sums: Summing | None) -> Measurement:
        """What the passes need; the model is checked on the longest, the reference proved on the first pair.

        Args:
            plan: of the pairs.
            sums: where scores are added up for the set's block.
        """
        policy, options = self.policy, self.options
        engine = make_engine(policy.model, policy.parameters, options.engine)
        if plan.first_pass:
            engine.check(policy.collate(extremes(self.tokens)))
            check_reference(policy, policy.collate(plan.first_pass[:1]))
        columns = column_functions(options.diagnostics)
        return Measurement(policy, engine, columns, options.modules, self.metric, sums)


def check_request(options: ProbeConfig, losses: Sequence[PreferenceLoss], *, are_named: bool) -> None:
    """Refuse what can't be had, before anything is read.

    Args:
        options: how pairs are measured and judged.
        losses: those to be judged.
        are_named: whether the user named them.

    Raises:
        ConfigError: a loss is given twice or can't be judged on any rows, or a diagnostic isn't known.
    """
    check_labels(losses)
    judgeable(losses, are_named, has_reference=True)  # the reference isn't known yet
    resolve(options.diagnostics)


def check_group(column: str, pairs: Sequence[PreferencePair]) -> None:
    """Refuse to group by a column that nothing has; the default one may be absent.

    Args:
        column: to group by.
        pairs: all pairs.

    Raises:
        ConfigError: neither the pairs nor a probe's rows have it.
    """
    there = {name for pair in pairs for name in pair.extra}
    if column not in {*there, *ROW_COLUMNS, ProbeConfig.group_by}:
        raise ConfigError(
            f"Expected a column {column!r} in the data, to group by; its further columns are: "
            f"{', '.join(sorted(there)) or 'none'}."
        )


def judgeable(
    losses: Sequence[PreferenceLoss], are_named: bool, *, has_reference: bool
) -> tuple[list[PreferenceLoss], list[str]]:
    """The losses that can be judged, and why the others can't.

    Args:
        losses: those asked for.
        are_named: whether the user named them.
        has_reference: whether there are reference log-probs.

    Raises:
        ConfigError: a named one can't be judged.
    """
    usable, refused = usable_losses(losses, has_reference=has_reference)
    if refused and are_named:
        raise ConfigError(" ".join(refused))
    return usable, refused
