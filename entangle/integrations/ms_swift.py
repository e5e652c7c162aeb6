"""ms-swift's callback, registered by a plugin file of the user's own.

    # probe.py
    from entangle.integrations.ms_swift import register
    register(pairs="probe.jsonl", every=50)

    swift rlhf --rlhf_type dpo ... --external_plugins probe.py --callbacks entangle

Written from the source of ms-swift 4.6: `callbacks_map[name](args, trainer)`, before the trainer is complete.
"""

from __future__ import annotations

from typing import Any

from entangle.integrations.options import callback_of
from entangle.training import EntanglementCallback


def register(name: str = "entangle", **options: Any) -> None:
    """Give ms-swift the callback under a name, for `--callbacks`.

    Options are looked at at once, so that a mistake in them shows before a model is loaded.

    Args:
        name: what `--callbacks` calls it.
        options: those of `EntanglementCallback`, and of `entangle.data.read_pairs` for the file of `pairs`.

    Raises:
        ImportError: ms-swift isn't there.
        UserError: the options make no sense.
    """
    from swift.callbacks.mapping import callbacks_map  # pyright: ignore[reportMissingImports]

    callback = callback_of(options)

    def made(args: Any, trainer: Any) -> EntanglementCallback:
        return callback.tell(trainer)

    callbacks_map[name] = made
