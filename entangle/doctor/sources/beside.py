"""What lies beside a log: the model, the model card, and other logs that have what this one lacks."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from entangle.doctor.log import TRAINERS, Origin

LOGS = (
    "trainer_state.json",
    "checkpoint-*/trainer_state.json",
    "log_history.json",
    "logging.jsonl",
    "events.out.tfevents.*",
    "runs/*/events.out.tfevents.*",
    "*.csv",
    "*.jsonl",
    "*.log",
)
"""Files that a run leaves, the surest first."""

_REWARDS = re.compile(rb"rewards ?/ ?(chosen|rejected)|chosen_reward|frac_reward_zero_std|reward_std")
_ENOUGH = 2_000_000


def origin(folder: Path) -> Origin:
    """What a log's folder, or the one above, says of its run: trainer, version, model and data."""
    cards = [_front(place / "README.md") for place in (folder, folder.parent)]
    versions = [_version(place / "README.md") for place in (folder, folder.parent)]
    options = [_yaml(place / "config.yaml") for place in (folder, folder.parent)]
    tags = [tag for card in cards for tag in _texts(card.get("tags")) if tag in TRAINERS]
    named = [*options, *({"dataset_name": name} for card in cards for name in _texts(card.get("datasets")))]
    data = next((place["dataset_name"] for place in named if isinstance(place.get("dataset_name"), str)), "")
    return Origin(
        next(iter(tags), None),
        next(filter(None, versions), None),
        _model(folder) or _model(folder.parent) or _base(options, cards),
        shlex.quote(data) if data else "",
    )


def with_rewards(file: Path) -> Path | None:
    """A log beside a file, one folder up or in its checkpoints, that has rewards; None if there is none."""
    for candidate in _candidates(file):
        try:
            with candidate.open("rb") as content:
                if _REWARDS.search(content.read(_ENOUGH)):
                    return candidate
        except OSError:
            continue
    return None


def advice(file: Path, otherwise: str) -> str:
    """Which file to give instead: the one beside it that has rewards, or in words where there is none."""
    near = with_rewards(file)
    return f"{otherwise}." if near is None else f"{near} has them: entangle doctor {shlex.quote(str(near))}."


def _candidates(file: Path) -> Iterator[Path]:
    for folder in (file.parent, file.parent.parent):
        for pattern in LOGS:
            found = [near for near in folder.glob(pattern) if near.is_file() and near != file]
            yield from sorted(found, key=lambda near: near.stat().st_mtime, reverse=True)


def _model(folder: Path) -> str:
    """Options that name the model in a folder: an adapter on its base, or a whole model."""
    adapter = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(adapter, str) and adapter:
        return (
            f"--model_name_or_path {shlex.quote(adapter)} --adapter_name_or_path {shlex.quote(str(folder))}"
        )
    if "model_type" in _json(folder / "config.json"):
        return f"--model_name_or_path {shlex.quote(str(folder))}"
    return ""


def _base(options: list[dict[str, Any]], cards: list[dict[str, Any]]) -> str:
    """The model that the run began from, where its folder holds no weights."""
    named = [place.get(key) for key in ("model_name_or_path", "base_model") for place in (*options, *cards)]
    base = next((name for name in named if isinstance(name, str) and name), "")
    return f"--model_name_or_path {shlex.quote(base)}" if base else ""


def _front(card: Path) -> dict[str, Any]:
    """The front matter of a model card."""
    parts = _text(card).split("---")
    try:
        front = yaml.safe_load(parts[1]) if len(parts) > 2 else None
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _version(card: Path) -> tuple[int, ...] | None:
    """TRL's version, as a model card lists it."""
    found = re.search(r"\bTRL:\s*(\d{1,3})\.(\d{1,3})", _text(card), re.IGNORECASE)
    return (int(found[1]), int(found[2])) if found else None


def _yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_text(file))
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(file) or "{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    except OSError:
        return ""


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]
