"""The command line: `entangle VERB [--flags]`, one options class and one function per verb."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from entangle.errors import UserError
from entangle.version import __version__


def probe(arguments: Sequence[str]) -> int:
    """Geometry of every pair, and what each loss would do to it."""
    from rich.console import Console

    from entangle.config import ProbeConfig, parse

    config, ignored = parse(ProbeConfig, arguments, prog="entangle probe")
    notes = Console(stderr=True)
    if ignored:
        notes.print(f"Ignored, since they only concern training: {', '.join(ignored)}.", markup=False)
    if config.dry_run:
        from entangle.estimate import estimate

        Console().print(estimate(config))
        return 0
    from accelerate import PartialState

    from entangle.probe import run_probe
    from entangle.progress import Interrupted

    try:
        result = run_probe(config, notes)
    except Interrupted as interrupted:
        notes.print(str(interrupted), markup=False)
        return 130
    if PartialState().is_main_process:
        console = Console()
        console.print(result.renderable())
        console.print(f"Run folder: {result.run.path}", markup=False, soft_wrap=True)
    return 0


def whatif(arguments: Sequence[str]) -> int:
    """Other losses and hyper-parameters on a finished probe's pairs, without the model."""
    from rich.console import Console

    from entangle.config import WhatIfConfig, parse
    from entangle.errors import ConfigError

    config, _ = parse(WhatIfConfig, arguments, prog="entangle whatif")
    if not config.run:
        raise ConfigError("expected the run folder of a finished probe: entangle whatif RUN. Got none.")
    from entangle.whatif import run_whatif

    result, folder = run_whatif(config)
    console = Console()
    console.print(result.renderable(config.rows))
    console.print(f"Run folder: {folder.path}", markup=False, soft_wrap=True)
    return 0


def tokens(arguments: Sequence[str]) -> int:
    """Which tokens entangle a pair: a finished probe's pairs taken apart into their tokens."""
    from rich.console import Console

    from entangle.config import TokensConfig, parse
    from entangle.errors import ConfigError

    config, _ = parse(TokensConfig, arguments, prog="entangle tokens")
    if not config.run:
        raise ConfigError("expected the run folder of a finished probe: entangle tokens RUN. Got none.")
    from entangle.tokens import run_tokens

    result = run_tokens(config)
    console = Console()
    console.print(result.renderable(config.rows))
    console.print(f"Tokens: {result.probe.run.path / 'tokens.parquet'}", markup=False, soft_wrap=True)
    return 0


def losses(arguments: Sequence[str]) -> int:
    """The catalogue of losses, or everything about one of them."""
    from rich.console import Console

    from entangle import catalogue
    from entangle.config import LossesConfig, parse, parse_loss
    from entangle.report.tables import loss_table

    config, _ = parse(LossesConfig, arguments, prog="entangle losses")
    console = Console()
    try:
        if config.name is not None:
            console.print(
                catalogue.explain(parse_loss(config.name)), markup=False, highlight=False, soft_wrap=True
            )
        elif config.markdown:
            print(catalogue.markdown_table(), end="")
        else:
            rows = catalogue.loss_rows(
                family=config.family, needs_reference=config.needs_reference,
                batch_coupled=config.batch_coupled, needs_tokens=config.needs_tokens,
            )  # fmt: skip
            console.print(loss_table(rows))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def rft(arguments: Sequence[str]) -> int:
    """Spread of the rewards of sampled answers, and the reward gradient that it leaves."""
    from rich.console import Console

    from entangle.config import RftConfig, parse

    config, ignored = parse(RftConfig, arguments, prog="entangle rft")
    notes = Console(stderr=True)
    if ignored:
        notes.print(f"Ignored, since they only concern training: {', '.join(ignored)}.", markup=False)
    from entangle.progress import Interrupted
    from entangle.rft import run_rft

    if config.before is not None:
        from entangle.rft import run_change

        change = run_change(config)
        Console().print(change.renderable())
        Console().print(f"Run folder: {change.run.path}", markup=False, soft_wrap=True)
        return 0
    try:
        result = run_rft(config, notes)
    except Interrupted as interrupted:
        notes.print(str(interrupted), markup=False)
        return 130
    console = Console()
    console.print(result.renderable())
    console.print(f"Run folder: {result.run.path}", markup=False, soft_wrap=True)
    return 0


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "probe": probe,
    "whatif": whatif,
    "tokens": tokens,
    "losses": losses,
    "rft": rft,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status: 0 well, 1 a threshold is broken, 2 something given can't be used."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in VERBS:
        print(f"entangle: unknown command {words[0]!r}. Known: {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    _quieten()
    try:
        return VERBS[words[0]](words[1:])
    except UserError as error:
        print(f"entangle {words[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def _quieten() -> None:
    """Keep other libraries out of the terminal and polite: what a user must know, the command says itself."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow a busy machine down tenfold
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")


def _usage() -> str:
    lines = [f"  {name:<10}{(function.__doc__ or '').splitlines()[0]}" for name, function in VERBS.items()]
    return "\n".join([
        "usage: entangle COMMAND [--help] [--config FILE] [--option value ...]", "",
        "Measures gradient entanglement in preference training.", "", "commands:", *lines, "",
        "`entangle probe` without options runs on the policy and the pairs that ship with the package.",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
