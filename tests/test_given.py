"""A model of the user's without data, or data without a model, never meets what ships with the package unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from entangle.config import ProbeConfig, RftConfig, TrainConfig, parse, read_yaml
from entangle.errors import ConfigError
from tests.conftest import SHARED


def write(folder: Path, text: str) -> str:
    (folder / "other.yaml").write_text(text)
    return str(folder / "other.yaml")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model_name_or_path", "x"], "A model is given .x. and no data.*--dataset_name"),
        (["--adapter_name_or_path", "x"], "A model is given .x. and no data"),
        (["--dataset_name", "y"], "Data is given .y. and no model.*--model_name_or_path"),
    ],
)
def test_one_of_model_and_data_alone_is_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        parse(ProbeConfig, arguments, prog="x")
    with pytest.raises(ConfigError, match=message):
        lines = [
            f"{key.lstrip('-')}: {value}" for key, value in zip(arguments[::2], arguments[1::2], strict=True)
        ]
        parse(ProbeConfig, ["--config", write(tmp_path, "\n".join(lines))], prog="x")


@pytest.mark.parametrize(
    "cls, arguments",
    [
        (ProbeConfig, []),
        (ProbeConfig, ["--model_name_or_path", "x", "--dataset_name", "embedded"]),
        (ProbeConfig, ["--model_name_or_path", "embedded", "--dataset_name", "y"]),
        (ProbeConfig, ["--model_name_or_path", "x", "--dataset-name", "y"]),
        (RftConfig, ["--model_name_or_path", "x", "--rollouts", "y"]),
    ],
)
def test_both_named_or_none_goes_on(cls, arguments):
    assert parse(cls, arguments, prog="x")


@pytest.mark.parametrize(
    "name, keys",
    [
        ("llamafactory", ("dataset_name", "use_peft", "limit", "lora_target_modules")),
        ("axolotl", ("dataset_name", "model_name_or_path", "max_length", "use_peft")),
        ("handbook", ("dataset_name", "dataset_train_split", "max_length")),
    ],
)
def test_files_of_other_trainers_are_answered_with_our_keys(name, keys):
    path = next((SHARED / "cases").glob(f"48-*/{name}_dpo.yaml"), None)
    if path is None:
        pytest.skip("the cases (../shared/cases) aren't beside the project")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path, TrainConfig)
    assert all(f"here: {key}" in str(caught.value) for key in keys)
