"""The command line: `entangle COMMAND [--flags]`. One table of commands, and the life that all of them share.

options  parsed from a YAML file and flags, names and paths checked before anything heavy is imported
run      the command's function: from options, and a console for its notes, to a result (None has shown itself)
result   printed by the main process, with where it is kept
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from entangle.errors import UserError
from entangle.tables.text import visible, visible_lines
from entangle.version import __version__


@dataclass(frozen=True)
class Command:
    """A command of the command line.

    Args:
        name: what is typed.
        options: `module:class` of its options, which `entangle.config` holds.
        function: `module:function`, from the options and a console to a result.
        group: the heading that it is listed under.
        line: what it does.
        has_page: whether its runs always have something for `entangle report`.
    """

    name: str
    options: str
    function: str
    group: str
    line: str
    has_page: bool = False

    @property
    def config(self) -> type:
        """The class of its options."""
        return _named(self.options)

    def run(self, config: Any, console: Any) -> Any:
        """Call its function, which is imported only now."""
        return _named(self.function)(config, console)


def _named(place: str) -> Any:
    """What `module:name` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "probe",
            "entangle.config.probe:ProbeConfig",
            "entangle.commands.probe:command",
            "Measure",
            "Geometry of every pair, and what each loss would do to it.",
            has_page=True,
        ),
        Command(
            "tokens",
            "entangle.config.tokens:TokensConfig",
            "entangle.commands.tokens:command",
            "Measure",
            "Which tokens entangle a pair: a finished probe's pairs taken apart into their tokens.",
        ),
        Command(
            "across",
            "entangle.config.across:AcrossConfig",
            "entangle.commands.across:command",
            "Measure",
            "Entanglement across pairs: what all other pairs of a finished probe do to each pair.",
        ),
        Command(
            "sweep",
            "entangle.config.sweep:SweepConfig",
            "entangle.commands.sweep:run_sweep",
            "Measure",
            "The probe at every checkpoint of a training run, and when both log-probs began to fall.",
            has_page=True,
        ),
        Command(
            "rft",
            "entangle.config.rft:RftConfig",
            "entangle.commands.rft:command",
            "Measure",
            "Spread of the rewards of sampled answers, and the reward gradient that it leaves.",
            has_page=True,
        ),
        Command(
            "joint",
            "entangle.config.joint:JointConfig",
            "entangle.commands.joint:run_joint",
            "Measure",
            "DPO's signal beside RFT's on the same prompts: which give none to which method, and why.",
            has_page=True,
        ),
        Command(
            "whatif",
            "entangle.config.whatif:WhatIfConfig",
            "entangle.commands.whatif:command",
            "Decide",
            "Other losses and hyper-parameters on a finished probe's pairs, without the model.",
        ),
        Command(
            "forecast",
            "entangle.config.forecast:ForecastConfig",
            "entangle.commands.forecast.run:command",
            "Decide",
            "Training curves of a finished probe's pairs under any loss, without training.",
        ),
        Command(
            "filter",
            "entangle.config.filter:FilterConfig",
            "entangle.commands.filter:command",
            "Decide",
            "The data set of a finished probe without its harmful pairs, or with weights.",
        ),
        Command(
            "losses",
            "entangle.config.losses:LossesConfig",
            "entangle.commands.losses:show_losses",
            "Decide",
            "The catalogue of losses, or everything about one of them.",
        ),
        Command(
            "train",
            "entangle.config.train:TrainConfig",
            "entangle.commands.train:run_train",
            "Train",
            "Preference training (or fine-tuning) by TRL with any loss and mitigation: entangle train CONFIG.",
        ),
        Command(
            "compare",
            "entangle.config.compare:CompareConfig",
            "entangle.commands.compare:run_compare",
            "Train",
            "Train losses x settings x seeds from one start, and judge them on the same held-out pairs and posts.",
        ),
        Command(
            "doctor",
            "entangle.config.doctor:DoctorConfig",
            "entangle.commands.doctor:run_doctor",
            "Look back",
            "What the log of a past training run says: nothing else is read.",
        ),
        Command(
            "why",
            "entangle.config.why:WhyConfig",
            "entangle.report.why:command",
            "Look back",
            "Why both log-probs fell in a past run: log, checkpoints and pairs in one go, in five lines and a page.",
        ),
        Command(
            "report",
            "entangle.config.report:ReportConfig",
            "entangle.report.command:command",
            "Look back",
            "Finished runs as one self-contained HTML page, a README's section or figures: entangle report RUN.",
        ),
    )
}
"""Every command by its name, in the order of the help. A new one is its options, its function and its line here."""

LONGEST = 4000
"""Characters of a line of an error that are shown, at most."""

OWN_FAULT = 70
"""Exit status of an error that nobody foresaw: neither a warning (1) nor something given that can't be used (2)."""

BROKEN_PIPE = 141
"""Exit status when the reader of the output has gone, as a shell has it for SIGPIPE."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0 well, 1 a threshold is broken, 2 something given can't be used, 70 an error of the program's own, 130 interrupted,
    141 nobody reads the output.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        _make_printable(stream)
    try:
        status = _answer(words)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"entangle {words[0]}: {visible_lines(error, LONGEST)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush goes nowhere
        return BROKEN_PIPE
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


def _answer(words: Sequence[str]) -> int:
    """What the words ask for: help, the version, or a command."""
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        print(
            f"entangle: unknown command {visible(words[0])!r}. Known: {', '.join(COMMANDS)}.", file=sys.stderr
        )
        return 2
    _quieten()
    was_grouped = _is_in_group()
    status = _live(COMMANDS[words[0]], words[1:])
    if status == 0 and not was_grouped and _is_in_group():
        _leave_group()
    return status


def _live(command: Command, arguments: Sequence[str]) -> int:
    """Options, the run, its result."""
    from entangle.config import check_names, parse
    from entangle.runs.progress import Interrupted, notes_console

    config, notes = parse(command.config, arguments, prog=f"entangle {command.name}")
    check_names(config, command.name)
    console = notes_console()
    for note in notes:
        console.print(note, markup=False)
    try:
        result = command.run(config, console)
    except Interrupted as interrupted:
        console.print(str(interrupted), markup=False)
        return 130
    return _show(command, result)


def _show(command: Command, result: Any) -> int:
    """Print a result and where it is kept, in one process of several; the exit status."""
    from entangle.commands.output import Output
    from entangle.tables.console import SafeConsole

    class Reader(SafeConsole):
        """A terminal or a pipe; one that was closed is `main`'s to answer."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    if result is None:
        return 0
    page = ""
    if not isinstance(result, Output):
        page = f"As a page for the browser: entangle report {result.run.path}" if command.has_page else ""
        result = Output(result.renderable(), f"Run folder: {result.run.path}")
    if _is_main():
        console = Reader()
        if isinstance(result.content, str):
            print(visible_lines(result.content))
        else:
            console.print(result.content, soft_wrap=not result.wraps)
        if result.place:
            console.print(result.place, markup=False, soft_wrap=True)
        if page:
            print(visible(page, None))
    return result.status


def _is_in_group() -> bool:
    """Whether this process is one of several that talk to each other, as under `torchrun`."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_main() -> bool:
    """Whether this process speaks for all."""
    return not _is_in_group() or sys.modules["torch"].distributed.get_rank() == 0


def _leave_group() -> None:
    """Part from the other processes once all have finished; NCCL warns of a group that is left behind."""
    import torch.distributed as processes

    processes.barrier()
    processes.destroy_process_group()


def _make_printable(stream: TextIO) -> None:
    """Print what a terminal's encoding lacks as `?`, instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _quieten() -> None:
    """Keep other libraries out of the terminal and polite: what a user must know, the command says itself."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow a busy machine down tenfold
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of its kernels on being imported


def _usage() -> str:
    lines: list[str] = []
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {c.name:<10}{c.line}" for c in COMMANDS.values() if c.group == group]
    return "\n".join(
        [
            "usage: entangle COMMAND [--help] [--config FILE] [--option value ...]",
            "",
            "Measures gradient entanglement in preference training.",
            *lines,
            "",
            "`entangle probe` without options runs on the policy and the pairs that ship with the package.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
