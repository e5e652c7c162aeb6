"""The command line: `entangle VERB [--flags]`, one options class and one function per verb."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from entangle.errors import ConfigError, UserError
from entangle.tables.text import visible, visible_lines
from entangle.version import __version__


def probe(arguments: Sequence[str]) -> int:
    """Geometry of every pair, and what each loss would do to it."""

    def run(config: Any, notes: Any) -> Any:
        if config.dry_run:
            from entangle.measure.estimate import estimate

            _show(estimate(config))
            return None
        from entangle.commands.probe import run_probe

        return run_probe(config, notes)

    return _measure("probe", "ProbeConfig", arguments, run)


def whatif(arguments: Sequence[str]) -> int:
    """Other losses and hyper-parameters on a finished probe's pairs, without the model."""
    from entangle.config import WhatIfConfig, parse

    config, _ = parse(WhatIfConfig, arguments, prog="entangle whatif")
    _need(config.run, "the run folder of a finished probe: entangle whatif RUN")
    from entangle.commands.whatif import run_whatif

    result, folder = run_whatif(config)
    _show(result.renderable(config.rows), "Run folder", folder.path)
    return 0


def tokens(arguments: Sequence[str]) -> int:
    """Which tokens entangle a pair: a finished probe's pairs taken apart into their tokens."""
    from entangle.config import TokensConfig, parse

    config, _ = parse(TokensConfig, arguments, prog="entangle tokens")
    _need(config.run, "the run folder of a finished probe: entangle tokens RUN")
    from entangle.commands.tokens import run_tokens

    result = run_tokens(config)
    _show(result.renderable(config.rows), "Tokens", result.probe.run.path / "tokens.parquet")
    return 0


def across(arguments: Sequence[str]) -> int:
    """Entanglement across pairs: what all other pairs of a finished probe do to each pair."""
    from entangle.config import AcrossConfig, parse

    config, _ = parse(AcrossConfig, arguments, prog="entangle across")
    _need(config.run, "the run folder of a finished probe: entangle across RUN")
    from entangle.commands.across import run_across

    result = run_across(config)
    _show(result.renderable(), "Across pairs", result.probe.run.path / "across.parquet")
    return 0


def losses(arguments: Sequence[str]) -> int:
    """The catalogue of losses, or everything about one of them."""
    from rich.console import Console

    from entangle import catalogue
    from entangle.config import LossesConfig, parse, parse_loss
    from entangle.tables.losses import loss_table

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

    def run(config: Any, notes: Any) -> Any:
        from entangle.commands.rft import run_change, run_rft

        return run_rft(config, notes) if config.before is None else run_change(config)

    return _measure("rft", "RftConfig", arguments, run)


def joint(arguments: Sequence[str]) -> int:
    """DPO's signal beside RFT's on the same prompts: which give none to which method, and why."""

    def run(config: Any, notes: Any) -> Any:
        from entangle.commands.joint import run_joint

        return run_joint(config, notes)

    return _measure("joint", "JointConfig", arguments, run)


def train(arguments: Sequence[str]) -> int:
    """Preference training (or fine-tuning) by TRL with any loss and mitigation: entangle train CONFIG."""

    def run(config: Any, notes: Any) -> Any:
        from entangle.commands.train import run_train

        return run_train(config, notes)

    return _measure("train", "TrainConfig", arguments, run)


def compare(arguments: Sequence[str]) -> int:
    """Train losses x settings x seeds from one start, and judge them on the same held-out pairs and posts."""

    def run(config: Any, notes: Any) -> Any:
        from entangle.commands.compare import run_compare

        return run_compare(config, notes)

    return _measure("compare", "CompareConfig", arguments, run)


def sweep(arguments: Sequence[str]) -> int:
    """The probe at every checkpoint of a training run, and when both log-probs began to fall."""

    def run(config: Any, notes: Any) -> Any:
        from entangle.commands.sweep import run_sweep

        return run_sweep(config, notes)

    return _measure("sweep", "SweepConfig", arguments, run)


def filter_pairs(arguments: Sequence[str]) -> int:
    """The data set of a finished probe without its harmful pairs, or with weights."""
    from rich.console import Console

    from entangle.config import FilterConfig, parse
    from entangle.errors import ConfigError

    config, _ = parse(FilterConfig, arguments, prog="entangle filter")
    if not config.run:
        raise ConfigError("expected the run folder of a finished probe: entangle filter RUN. Got none.")
    from entangle.commands.filter import run_filter

    result = run_filter(config)
    console = Console()
    console.print(result.renderable())
    written = "Dry run: nothing is written." if config.dry_run else f"Data: {result.out}"
    console.print(written, markup=False, soft_wrap=True)
    return 0


def doctor(arguments: Sequence[str]) -> int:
    """What the log of a past training run says: nothing else is read."""
    import json

    from rich.console import Console

    from entangle.config import DoctorConfig, parse
    from entangle.doctor import RULES, examine, read_log
    from entangle.tables.doctor import findings_text, rule_table

    config, _ = parse(DoctorConfig, arguments, prog="entangle doctor")
    console = Console()
    if config.list_rules:
        console.print(rule_table(vars(rule) for rule in RULES.values()))
        return 0
    _need(config.log, "the log of a past run: entangle doctor LOG")
    report = examine(read_log(config.log, config.trainer), config.rules)
    if config.json:
        print(json.dumps(report.content, indent=2, allow_nan=False))
    else:
        console.print(findings_text(report.content), soft_wrap=True)
    return report.exit_status


def _measure(verb: str, options: str, arguments: Sequence[str], run: Callable[[Any, Any], Any]) -> int:
    """A command that fills a run folder: options, the run, its tables.

    Args:
        verb: the command's name.
        options: its class in `entangle.config`.
        arguments: what the user typed.
        run: from options and a console for notes to a result with `renderable()` and `run`; None has shown itself.
    """
    import entangle.config
    from entangle.runs.progress import Interrupted, notes_console

    config, ignored = entangle.config.parse(
        getattr(entangle.config, options), arguments, prog=f"entangle {verb}"
    )
    notes = notes_console()
    if ignored:
        notes.print(f"Ignored, since they don't concern this command: {', '.join(ignored)}.", markup=False)
    try:
        result = run(config, notes)
    except Interrupted as interrupted:
        notes.print(str(interrupted), markup=False)
        return 130
    from accelerate import PartialState

    if result is not None and PartialState().is_main_process:
        _show(result.renderable(), "Run folder", result.run.path)
        if verb in PAGED:
            print(f"As a page for the browser: entangle report {result.run.path}")
    return 0


def _show(renderable: Any, what: str = "", place: Path | None = None) -> None:
    """Print a result, and where it is kept."""
    from rich.console import Console

    console = Console()
    console.print(renderable)
    if place is not None:
        console.print(f"{what}: {place}", markup=False, soft_wrap=True)


def _need(given: str, expected: str) -> None:
    """Refuse a command whose positional is missing."""
    if not given:
        raise ConfigError(f"expected {expected}. Got none.")


def report(arguments: Sequence[str]) -> int:
    """Finished runs as one self-contained HTML page, or their figures as files: entangle report RUN."""
    from entangle.config import ReportConfig, parse

    config, _ = parse(ReportConfig, arguments, prog="entangle report")
    _need(" ".join(config.runs), "one or more run folders: entangle report RUN [RUN2 ...]")
    from entangle.report.command import run_report

    for path in run_report(config):
        print(path)
    return 0


LONGEST = 4000
"""Characters of a line of an error that are shown, at most."""

OWN_FAULT = 70
"""Exit status of an error that nobody foresaw: neither a warning (1) nor something given that can't be used (2)."""

PAGED = ("probe", "sweep", "rft", "joint")
"""Commands whose runs always have something for a page."""

VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "probe": probe,
    "whatif": whatif,
    "tokens": tokens,
    "across": across,
    "losses": losses,
    "train": train,
    "compare": compare,
    "sweep": sweep,
    "rft": rft,
    "joint": joint,
    "report": report,
    "filter": filter_pairs,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status.

    0 well, 1 a threshold is broken, 2 something given can't be used, 70 an error of the program's own, 130 interrupted.
    """
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
    is_ours = not _is_in_group()
    try:
        status = VERBS[words[0]](words[1:])
        if status == 0 and is_ours and _is_in_group():
            _leave_group()
        return status
    except UserError as error:
        print(f"entangle {words[0]}: {visible_lines(error, LONGEST)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except Exception as error:
        return _own_fault(words, error)


def _own_fault(words: Sequence[str], error: Exception) -> int:
    """Show where an error of the program's own happened, and what to send; a status that no finding has."""
    print(visible_lines("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(
        f"\nentangle {words[0]}: this is an error of entangle itself, not of what you gave. Nothing it printed before "
        f"is a verdict. Please send the lines above, the command ({visible(shlex.join(['entangle', *words]))}) and the "
        f"version ({__version__}, Python {sys.version.split()[0]}) to the project's issues.",
        file=sys.stderr,
    )
    return OWN_FAULT


def _is_in_group() -> bool:
    """Whether this process is one of several that talk to each other, as under `torchrun`."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _leave_group() -> None:
    """Part from the other processes once all have finished; NCCL warns of a group that is left behind."""
    import torch.distributed as processes

    processes.barrier()
    processes.destroy_process_group()


def _quieten() -> None:
    """Keep other libraries out of the terminal and polite: what a user must know, the command says itself."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow a busy machine down tenfold
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of its kernels on being imported


def _usage() -> str:
    lines = [f"  {name:<10}{(function.__doc__ or '').splitlines()[0]}" for name, function in VERBS.items()]
    return "\n".join([
        "usage: entangle COMMAND [--help] [--config FILE] [--option value ...]", "",
        "Measures gradient entanglement in preference training.", "", "commands:", *lines, "",
        "`entangle probe` without options runs on the policy and the pairs that ship with the package.",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
