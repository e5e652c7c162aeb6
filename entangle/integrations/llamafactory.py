"""LLaMA-Factory with the callback: `python -m entangle.integrations.llamafactory config.yaml [key=value ...]`.

The YAML is LLaMA-Factory's own, with a key `entangle` beside its keys:

    entangle:
      pairs: 64        # of the training's own, in the very tokens that are trained on; or a file
      every: 50

LLaMA-Factory doesn't tell callbacks the trainer. The callback is told the model, the tokenizer and the training set, so
rows are written to OUTPUT_DIR/entangle and warnings are shown, but nothing is added to the run's log; the trained loss
is what the YAML says, and the reference the adapter switched off: a full fine-tuning's reference can't be reached.
Several processes: `torchrun --nproc_per_node N -m entangle.integrations.llamafactory config.yaml`. Written from the
source of LLaMA-Factory 0.9.5.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from entangle.config.foreign import losses_of_trl
from entangle.errors import ConfigError, UserError
from entangle.integrations.options import KEY, callback_of

KNOWN_LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "orpo")
"""Values of `pref_loss` that are the losses of these names here."""

CHANGES = ("pref_ftx", "pref_bco_weight", "dpo_label_smoothing", "ld_alpha")
"""Keys that change the loss; where one is set, the loss must be named."""


def run(arguments: Sequence[str]) -> None:
    """Train as `llamafactory-cli train` does, with the callback.

    Args:
        arguments: the YAML file, then `key=value` over its keys.

    Raises:
        UserError: the file can't be used, or its key `entangle`.
    """
    content = read(arguments)
    options = content.pop(KEY, None)
    callback = callback_of(options, loss_of(content))
    try:
        from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            f"LLaMA-Factory can't be imported here ({error}): pip install llamafactory."
        ) from error
    run_exp(content, callbacks=[callback])


def read(arguments: Sequence[str]) -> dict[str, Any]:
    """The YAML file as a dict, with what the command line changes of it.

    Raises:
        ConfigError: there is no such file, it isn't a mapping, or an argument isn't `key=value`.
    """
    file, *changes = arguments or [""]
    if not file.endswith((".yaml", ".yml", ".json")) or not Path(file).is_file():
        raise ConfigError(f"Expected LLaMA-Factory's YAML or JSON file, then key=value; got {file!r}.")
    content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys with values; got {type(content).__name__}.")
    for change in changes:
        key, is_given, value = change.partition("=")
        if not is_given or "." in key:
            raise ConfigError(f"Expected key=value after the file; got {change!r}.")
        content[key] = yaml.safe_load(value)
    return content


def loss_of(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The loss that LLaMA-Factory's keys name; None where it isn't known, or another stage is trained."""
    name = content.get("pref_loss", "sigmoid")
    if content.get("stage") != "dpo" or name not in KNOWN_LOSSES or any(map(content.get, CHANGES)):
        return None
    options = {"loss_type": name, "beta": content.get("pref_beta", 0.1)}
    if name == "simpo":
        options["simpo_gamma"] = content.get("simpo_gamma", 0.5)
    return losses_of_trl(options)[0]


if __name__ == "__main__":
    try:
        run(sys.argv[1:])
    except UserError as refused:
        sys.exit(f"Error: {refused}")
