"""`entangle losses`: the catalogue, or everything about one loss."""

from __future__ import annotations

from rich.console import Console

from entangle import catalogue
from entangle.commands.output import Output
from entangle.config import LossesConfig, build_losses
from entangle.errors import ConfigError
from entangle.tables.losses import loss_table


def show_losses(config: LossesConfig, console: Console | None = None) -> Output:
    """The table that the options ask for.

    Raises:
        ConfigError: there is no such loss or family.
    """
    if config.name is not None:
        (loss,) = build_losses([config.name])
        return Output(catalogue.explain(loss))
    if config.markdown:
        return Output(catalogue.markdown_table().removesuffix("\n"))
    try:
        rows = catalogue.loss_rows(
            family=config.family,
            needs_reference=config.needs_reference,
            batch_coupled=config.batch_coupled,
            needs_tokens=config.needs_tokens,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Output(loss_table(rows))
