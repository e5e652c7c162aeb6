"""Where a trained adapter's reference is, if it isn't the base: the start that a trainer saved beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from entangle.config.places import is_local
from entangle.errors import ModelError
from entangle.models.origin import Origin

_NAMED = re.compile(r"ref(erence)?([_-]?(model|adapter|policy))?", re.IGNORECASE)


@dataclass(frozen=True)
class Start:
    """What a training began from, where a folder tells.

    Args:
        adapter: the adapter that stands for it; None: nothing beside the policy tells.
        note: what was found and done, for people.
    """

    adapter: str | None = None
    note: str | None = None


def adapters_in(folder: Path) -> list[str]:
    """Names of the sub-folders that hold an adapter, a run's checkpoints left out."""
    if not folder.is_dir():
        return []
    found = (file.parent.name for file in folder.glob("*/adapter_config.json"))
    return sorted(name for name in found if not name.startswith("checkpoint-"))


def find_start(origin: Origin, reference: str) -> Start:
    """The reference that a trainer saved with an adapter, if `reference` leaves the choice.

    TRL trains an adapter that was there before beside a frozen copy of it, saved as `ref` in the adapter's folder: that
    copy is the reference, and the base with the adapter off isn't.

    Raises:
        ModelError: an adapter beside the policy's is named as a reference, and nothing says whether it is.
    """
    if origin.adapter is None or not is_local(origin.adapter) or reference not in ("auto", "adapter_off"):
        return Start()
    folder = Path(origin.adapter).resolve()
    if "ref" in adapters_in(folder):
        named = f"{origin.adapter}/ref"
        if reference == "adapter_off":
            return Start(
                None,
                f"The reference is the base with the adapter off, as asked for, though {named} is there "
                "(TRL saves the adapter there that its training began from).",
            )
        return Start(
            named,
            f"The reference is {named}: the adapter that TRL's training began from, not the base with the adapter off "
            "(which --reference adapter_off takes).",
        )
    if reference == "auto" and not _NAMED.fullmatch(folder.name):
        beside = [*_named(folder, origin.adapter), *_named(folder.parent, str(Path(origin.adapter).parent))]
        if beside:
            raise ModelError(
                f"{beside[0]} is an adapter that is named as the reference of {origin.adapter}. Say which reference "
                f"is meant: --ref_model_name_or_path {beside[0]}, or --reference adapter_off for the base with the "
                "adapter off."
            )
    return Start()


def _named(folder: Path, shown: str) -> list[str]:
    return [f"{shown}/{name}" for name in adapters_in(folder) if _NAMED.fullmatch(name)]
