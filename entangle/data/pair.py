"""A preference pair."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entangle.config.hashing import sha256_of
from entangle.data.messages import Text


@dataclass(frozen=True)
class PreferencePair:
    """One prompt with a chosen and a rejected response, as the source has them.

    Args:
        index: row in the data set (in the named split), whatever subset was taken.
        prompt: a string, or a list of `{"role", "content"}` messages.
        chosen: the preferred response, of the same kind as the prompt.
        rejected: the other response.
        ref_chosen_logps: log pi_ref(chosen | prompt), summed, nats; None unless the data carries it.
        ref_rejected_logps: the same for the rejected response.
        extra: further scalar columns by name.
        template_options: what TRL hands to the chat template besides the messages (`tools` and the like).
    """

    index: int
    prompt: Text
    chosen: Text
    rejected: Text
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_conversational(self) -> bool:
        """Whether the texts are lists of messages."""
        return not isinstance(self.prompt, str)

    @property
    def prompt_hash(self) -> str:
        """First 16 hex digits of the sha256 of the prompt: equal prompts have equal hashes, in every run."""
        return sha256_of([canonical(self.prompt).encode()])[:16]


def canonical(value: Any) -> str:
    """A value as one text: equal values have equal texts."""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
