"""What a person at the terminal sees of a training run: a bar with the time left, and a Ctrl-C that saves first."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from entangle.runs.progress import deferred_interrupt, progress_bar


class ProgressCallback(TrainerCallback):
    """A progress bar over optimiser steps; the first Ctrl-C saves a checkpoint and ends the training.

    Use as a context manager around `train()`.

    Args:
        console: where the bar goes.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.is_stopped = False
        self._stack = ExitStack()

    def __enter__(self) -> ProgressCallback:
        self._interrupted = self._stack.enter_context(deferred_interrupt("this step"))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the bar; a resumed run starts where it was."""
        bar = progress_bar(self.console, "steps", state.max_steps, state.global_step)
        self._advance = self._stack.enter_context(bar)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Advance; after a Ctrl-C save and stop."""
        self._advance(1)
        if self._interrupted() and state.global_step < state.max_steps:
            self.is_stopped = control.should_save = control.should_training_stop = True
