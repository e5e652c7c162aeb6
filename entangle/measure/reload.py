"""A finished probe's policy and pairs, loaded again from the run's own options; they must still be the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState

from entangle.config import ProbeConfig, read_yaml
from entangle.config.hashing import hash_file
from entangle.data import TokenizedPair, hash_pairs
from entangle.errors import ConfigError, RunError
from entangle.measure.inputs import load_pairs_of, load_policy_of
from entangle.models import Policy, load_adam_state, optimizer_file
from entangle.runs.folder import RunFolder
from entangle.scores import Metric


def recorded_options(run: RunFolder) -> ProbeConfig:
    """The options of the run, as they were given.

    Raises:
        RunError: its config.yaml isn't a probe's.
    """
    file = run.path / "config.yaml"
    try:
        return ProbeConfig(**read_yaml(file, ProbeConfig).values)
    except (ConfigError, TypeError) as error:
        raise RunError(f"Expected the options of a probe in {file}: {error}") from error


def options_of(run: RunFolder) -> ProbeConfig:
    """The options of the run, less its reference, which isn't needed again: the incentives are in its rows."""
    return replace(recorded_options(run), reference="none", ref_model_name_or_path=None)


def load_again(
    run: RunFolder, options: ProbeConfig, indices: Sequence[int], processes: PartialState | None = None
) -> tuple[Policy, list[TokenizedPair]]:
    """The policy and the named pairs.

    Args:
        run: the finished probe.
        options: its own.
        indices: of the pairs.
        processes: this one among others, each of which takes an accelerator of its own.

    Raises:
        RunError: model, adapter, tokenizer, data or optimiser's state is another one than when the run was made.
    """
    pairs = load_pairs_of(options)
    data = hash_pairs(pairs)
    recorded: dict[str, Any] = run.read_json("identity.json")
    _check_same(run, {"data": recorded.get("data")}, {"data": data})
    policy = load_policy_of(options, processes)
    found = dict(policy.identity) | {"data": data}
    if options.optimizer_state is not None:
        found["optimizer"] = hash_file(optimizer_file(options.optimizer_state))
    _check_same(run, recorded, found)
    by_index = {pair.index: pair for pair in pairs}
    return policy, policy.tokenize([by_index[index] for index in indices], options.max_length).tokens


def metric_again(options: ProbeConfig, policy: Policy) -> Metric | None:
    """The diagonal metric that the probe's products were taken in; None is SGD's.

    Args:
        options: the probe's.
        policy: loaded again.

    Raises:
        ModelError: the optimiser's state can't be read, or belongs to another model.
    """
    if options.optimizer_state is None:
        return None
    return load_adam_state(options.optimizer_state, policy.model, policy.trained).metric(policy.parameters)


def _check_same(run: RunFolder, recorded: dict[str, Any], found: dict[str, Any]) -> None:
    changed = sorted(key for key in {*recorded, *found} if recorded.get(key) != found.get(key))
    if changed:
        detail = "; ".join(f"{key}: {recorded.get(key)!r} there, {found.get(key)!r} now" for key in changed)
        raise RunError(
            f"{run.path} was made from other inputs ({detail}). Restore them, or probe again into another folder."
        )
