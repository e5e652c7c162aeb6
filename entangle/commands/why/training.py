"""What a training folder holds: checkpoints by step, and what its files say of the model, the data and the loss.

Of TRL, axolotl, unsloth and LLaMA-Factory the checkpoints are in the folder itself, of ms-swift one below it
(`v0-20260101-101010`). Settings stand in args.json (ms-swift), config.yaml, training_args.yaml or the model card.
training_args.bin is a pickle, and isn't opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from entangle.commands.sweep import find_checkpoints
from entangle.config.foreign import losses_of_trl
from entangle.config.places import is_local
from entangle.doctor.log import TRAINERS
from entangle.errors import RunError, UserError
from entangle.models.origin import has_file

SETTINGS = ("args.json", "config.yaml", "training_args.yaml", "training_args.json", "llamaboard_config.yaml")
"""Files in which trainers leave what they were told, the surest first; the model card comes last."""

_BASES = ("model_name_or_path", "base_model", "model")
_TRAINERS = ("rlhf_type", "rl")
_NAMES = {"pref_loss": "loss_type", "pref_beta": "beta", "rl_beta": "beta"}
_TYPES = {"kto_pair": "kto", "dpo": "sigmoid"}
_MOST_BYTES = 1_000_000
_FENCED = re.compile(r"^```ya?ml\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Training:
    """A training folder.

    Args:
        folder: where the run's files are; below the one that was named, with ms-swift.
        checkpoints: folders with a model or an adapter, by step, in order.
        is_final_only: there is no checkpoint-*, and the one entry is the folder itself.
        settings: what its files say, by their own names.
        notes: what a reader must know of how it was read.
    """

    folder: Path
    checkpoints: Mapping[int, Path]
    is_final_only: bool
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether the last checkpoint is an adapter."""
        return (self.last / "adapter_config.json").is_file()

    @property
    def last(self) -> Path:
        """The last checkpoint; the folder itself without any."""
        return [self.folder, *self.checkpoints.values()][-1]

    @property
    def base(self) -> str:
        """The model that training began from, if a file names one that is here."""
        named = (self.settings.get(key) for key in _BASES)
        return next((name for name in named if isinstance(name, str) and name and is_here(name)), "")

    @property
    def data(self) -> str:
        """The data set, if a file names one."""
        named = self.settings.get("dataset_name") or self.settings.get("dataset")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        return named if isinstance(named, str) else ""

    @property
    def loss(self) -> tuple[Any, str]:
        """The loss that it trained with, as a spec, and where that is from in words; None if nothing says so.

        A hyper-parameter that no file names has its default.
        """
        own = {_NAMES.get(key, key): value for key, value in self.settings.items() if value is not None}
        if own.get("loss"):
            return own["loss"], "its config.yaml"
        try:
            spec = _loss_of(own)
        except UserError as error:
            return None, str(error)
        if spec is None:
            return None, ""
        has_beta = "beta" in own
        return spec, "the run's files" + ("" if has_beta else ", which don't name beta: its default")


def is_here(model: str) -> bool:
    """Whether a model can be read without a download."""
    return (
        (Path(model) / "config.json").is_file() if is_local(model) else has_file(model, "config.json", "main")
    )


def read_training(place: str | Path) -> Training:
    """Look at a training folder.

    Raises:
        RunError: there is no such folder.
    """
    named = Path(place).expanduser()
    if not named.is_dir():
        raise RunError(
            f"Expected the output folder of a training run at {named}; there is none. Give the folder that holds its "
            "checkpoint-* folders or its log."
        )
    folder, notes = _folder_of(named)
    try:
        checkpoints, is_final = find_checkpoints(folder), False
    except RunError:
        is_final = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
        checkpoints = {0: folder} if is_final else {}
    return Training(folder, checkpoints, is_final, _settings(folder), notes)


def _folder_of(named: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder with the run's files: above a checkpoint that was named, or the newest below (ms-swift)."""
    if re.fullmatch(r"checkpoint-\d+", named.name):
        return named.parent, (f"{named.name} is one checkpoint; its run, {named.parent}, is looked at.",)
    if any(named.glob("checkpoint-*")) or any((named / name).is_file() for name in ("adapter_config.json",)):
        return named, ()
    below = {path.parent for path in named.glob("*/checkpoint-*") if path.is_dir()}
    below |= {path.parent for path in named.glob("v*-*/logging.jsonl")}
    if not below:
        return named, ()
    newest = max(below, key=lambda path: (max(file.stat().st_mtime for file in path.iterdir()), path.name))
    several = f"{len(below)} runs are in {named}; the newest, {newest.name}, is looked at."
    return newest, (several,) if len(below) > 1 else ()


def _settings(folder: Path) -> dict[str, Any]:
    """What the files of a run say, the surest file's word first."""
    places = [folder, *(path for path in sorted(folder.glob("checkpoint-*"))[-1:])]
    found: dict[str, Any] = {}
    for content in (part for place in places for part in _contents(place)):
        found = content | {key: value for key, value in found.items() if value is not None}
    return found


def _contents(place: Path) -> Iterator[dict[str, Any]]:
    for name in SETTINGS:
        yield _mapping(_text(place / name), name)
    card = _text(place / "README.md")
    front = card.split("---")[1] if card.startswith("---") and card.count("---") > 1 else ""
    head = _mapping(front, "README.md")
    tags = head.pop("tags", None)
    kinds = [tag for tag in tags if tag in TRAINERS] if isinstance(tags, list) else []
    head.pop("model", None)
    yield head | ({"rlhf_type": kinds[0]} if kinds else {})
    for block in _FENCED.findall(card):  # axolotl's model card holds the run's own file
        yield _mapping(block, "README.md")


def _mapping(text: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text or "{}") if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _text(file: Path) -> str:
    try:
        if file.is_file() and file.stat().st_size <= _MOST_BYTES:
            return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        pass
    return ""


def _loss_of(own: Mapping[str, Any]) -> Any:
    """A loss as a spec from settings by TRL's names; None if they don't name one."""
    trainer = next((own[key] for key in _TRAINERS if isinstance(own.get(key), str)), "")
    kind = own.get("loss_type")
    if isinstance(kind, str):
        kind = _TYPES.get(kind, kind)
    if trainer in ("simpo", "orpo", "cpo", "kto") and kind in (None, "sigmoid", trainer):
        kind = trainer
    if kind is None and trainer != "dpo" and "beta" not in own:
        return None
    if trainer == "cpo":  # TRL's has its NLL term per token of the batch
        own = {"cpo_alpha": 1.0, "nll_weight": 0.0} | dict(own)
    (spec,) = losses_of_trl(dict(own) | {"loss_type": kind or "sigmoid"})
    weight = next((own[key] for key in ("pref_ftx", "rpo_alpha", "cpo_alpha") if own.get(key)), 0)
    if isinstance(weight, int | float) and weight > 0:
        return {"name": "with_sft", "loss": spec, "alpha": weight, "sft": {"name": "sft_batch"}}
    return spec
