"""Options of `entangle doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from entangle.config.base import Options


@dataclass(frozen=True)
class DoctorConfig(Options):
    """What the log of a past run says: exit status 0 healthy, 1 a warning, 2 not a log that can be judged, 70 a bug."""

    log: tyro.conf.Positional[str] = ""
    """trainer_state.json, logging.jsonl, a table, events, trackio, printed rows, or a folder: its newest run."""
    json: bool = False
    """Print one JSON object instead of text."""
    trainer: Literal["dpo", "kto", "cpo", "simpo", "orpo", "grpo", "rloo"] | None = None
    """What the run was trained with, where its folder doesn't say: some names mean other things in other trainers."""
    rules: tuple[str, ...] = ()
    """Ask only these rules, each name or name=threshold. Default: all."""
    list_rules: bool = False
    """Show every rule with its threshold and the reason for it, and stop."""
