"""What a user names as a model: a folder or a hub id, of a base or of an adapter on one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from entangle.config.places import is_local, require_model
from entangle.data.hub import use_hub
from entangle.errors import ModelError

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Origin:
    """A base model and perhaps an adapter, each a folder or a hub id with its revision."""

    base: str
    base_revision: str = "main"
    adapter: str | None = None
    adapter_revision: str = "main"


def find_origin(name: str, revision: str = "main", adapter: str | None = None) -> Origin:
    """What the user named: an adapter's name stands for its base and itself.

    Raises:
        ModelError: there is no such folder, it holds neither model nor adapter, two adapters are named, or an
            adapter's base isn't where it says.
    """
    for given in filter(None, (name, adapter)):
        require_model(given)
        if not is_local(given):
            use_hub()
    if not _is_adapter(name, revision):
        return Origin(name, revision, adapter)
    if adapter is not None:
        raise ModelError(
            f"{name} holds an adapter, and a second one is given ({adapter}). Give the base model and one "
            "adapter."
        )
    config = adapter_config(name, revision)
    base = config.base_model_name_or_path
    if not base or (is_local(base) and not Path(base).is_dir()):
        raise ModelError(
            f"The adapter {name} says that its base is {base!r}, and there is no such folder here. Give the "
            "base as model_name_or_path and this folder as adapter_name_or_path: --model_name_or_path BASE "
            f"--adapter_name_or_path {name}"
        )
    return Origin(base, config.revision or "main", name, revision)


def _is_adapter(name: str, revision: str) -> bool:
    if is_local(name):
        folder = Path(name)
        if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
            _refuse_several(folder)
            there = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
            raise ModelError(
                f"Expected config.json (a model) or adapter_config.json (an adapter) in {name}; it holds "
                f"{there}. A run's checkpoints are usually in its checkpoint-* folders."
            )
    return has_file(name, "adapter_config.json", revision)


def _refuse_several(folder: Path) -> None:
    """Say what to give where a folder holds adapters in sub-folders and none itself."""
    names = sorted(file.parent.name for file in folder.glob("*/adapter_config.json"))
    names = [name for name in names if not name.startswith("checkpoint-")]
    if not names:
        return
    start = next((name for name in names if "ref" in name.lower()), None)
    policy = next((name for name in names if name != start), names[0])
    second = f" and {folder}/{start} as ref_model_name_or_path" if start and start != policy else ""
    count = f"{len(names)} adapters" if len(names) > 1 else "one adapter"
    raise ModelError(
        f"{folder} itself is no model; it holds {count} in sub-folders ({', '.join(names)}). Give {folder}/{policy} as "
        f"the model{second}."
    )


def has_file(name: str, file: str, revision: str) -> bool:
    """Whether a folder or a hub repository has a file; False too where the hub can't be reached."""
    if is_local(name):
        return (Path(name) / file).is_file()
    try:
        return cached_file(name, file, revision=revision) is not None
    except OSError:
        return False  # loading the model itself will say what is wrong


def adapter_config(name: str, revision: str) -> PeftConfig:
    """The configuration of the adapter `name`; ModelError where there is none."""
    if is_local(name) and not (Path(name) / "adapter_config.json").is_file():
        raise ModelError(f"Expected adapter_config.json in {name}; there is none, so it isn't an adapter.")
    try:
        return PeftConfig.from_pretrained(name, revision=revision)
    except (*LOADING_ERRORS, TypeError) as error:
        raise ModelError(f"Can't read the adapter {name}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The part of a library's message that a user can act on."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{'...' if len(text) > 400 else ''}"
