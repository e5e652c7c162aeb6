"""axolotl's plugin: a probe set beside a training, asked for in axolotl's own YAML.

    plugins:
      - entangle.integrations.axolotl.EntanglePlugin
    entangle:
      pairs: 64        # of the training's own; or a file, with format, columns, limit
      every: 50

axolotl adds the callback when its trainer is there, and knows the trainer. Checked against axolotl 0.19.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from entangle.integrations.options import KEY, callback_of
from entangle.training import EntanglementCallback


def callbacks_of(cfg: Any, trainer: Any) -> list[EntanglementCallback]:
    """The callback that a configuration asks for; none where it has no key `entangle`.

    Args:
        cfg: axolotl's configuration, a dict that gives None for what it lacks.
        trainer: axolotl's trainer; axolotl adds the callback itself.

    Raises:
        UserError: the options make no sense.
    """
    options = cfg.get(KEY)
    return [] if options is None else [callback_of(options).tell(trainer)]


def __getattr__(name: str) -> Any:
    """`EntanglePlugin` and `EntangleArgs`, made on first use from classes that axolotl brings."""
    makers = {"EntanglePlugin": _plugin, "EntangleArgs": _args}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return makers[name]()


@cache
def _args() -> type:
    from pydantic import create_model  # pyright: ignore[reportMissingImports]

    field: Any = (dict[str, Any] | None, None)
    return create_model("EntangleArgs", __module__=__name__, entangle=field)


@cache
def _plugin() -> type:
    from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]

    class EntanglePlugin(BasePlugin):
        """Adds EntanglementCallback with the options under the key `entangle`."""

        def get_input_args(self) -> str:
            """Where axolotl finds the key that its configuration gains."""
            return f"{__name__}.EntangleArgs"

        def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[EntanglementCallback]:
            """The callback, for axolotl to add."""
            return callbacks_of(cfg, trainer)

    return EntanglePlugin
