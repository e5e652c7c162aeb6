"""The YAML files of the experiments are read by the commands they are for; those of real scale are dry-run offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from entangle.cli import main
from entangle.commands.compare import trials_of
from entangle.commands.train import TrainResult
from entangle.config import CompareConfig, TrainConfig, build_losses, parse
from entangle.runs.folder import RunFolder
from entangle.training.arguments import trainer_arguments
from tests.training import runs

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"

RUNS = {
    "compare/tldr.yaml": 36,
    "compare/mitigations.yaml": 33,
    "compare/ledger.yaml": 8,
    "compare/ledger_trained.yaml": 8,
    "suffix/suffix.yaml": 3,
    "scale/tldr_mistral.yaml": 36,
    "scale/tldr_llama3.yaml": 36,
}
"""Comparisons with the number of their runs."""


def read(cls: type, name: str):
    config, ignored = parse(cls, ["--config", str(EXPERIMENTS / name)], prog="test")
    assert not ignored
    return config


@pytest.mark.parametrize("name", RUNS)
def test_comparisons_are_read_and_every_run_can_be_set_up(name: str, tmp_path: Path):
    config = read(CompareConfig, name)
    trials = trials_of(config)
    assert len(trials) == len({trial.train.output_dir for trial in trials}) == RUNS[name]
    assert len(config.losses) == len({loss.label for loss in build_losses(config.losses)})
    arguments = trainer_arguments(trials[0].train, tmp_path)  # TRL's own checks
    assert arguments.learning_rate == config.learning_rate


def test_runs_are_read():
    files = [*EXPERIMENTS.glob("train/*.yaml"), EXPERIMENTS / "early_warning/train.yaml"]
    assert len(files) > 4
    for file in files:
        read(TrainConfig, str(file))


SHAPES = {"scale/tldr_mistral.yaml": MistralConfig, "scale/tldr_llama3.yaml": LlamaConfig}


def stand_ins(folder: Path, shape: type) -> list[str]:
    """Flags that put a tiny model of the same architecture, and local data, in the place of what a hub has."""
    policy = runs.policy().config
    model = AutoModelForCausalLM.from_config(
        shape(
            **{
                name: getattr(policy, name)
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "pad_token_id",
                    "eos_token_id",
                )
            }
        )
    )
    model.save_pretrained(folder / "model")
    runs.tokenizer().save_pretrained(folder / "model")
    runs.pairs(12).to_json(folder / "pairs.jsonl")
    given = {"model_name_or_path": "model", "dataset_name": "pairs.jsonl", "output_dir": "out"}
    return [word for name, value in given.items() for word in (f"--{name}", str(folder / value))]


@pytest.mark.parametrize("name", SHAPES)
def test_scale_is_the_released_recipe_and_runs(name: str, tmp_path: Path):
    """The released settings of arXiv 2410.13828; one step of one run with them, on a tiny model."""
    config = read(CompareConfig, name)
    assert (config.lora_r, config.lora_alpha, config.learning_rate) == (64, 128, 5e-6)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 4)
    assert (config.num_train_epochs, config.warmup_steps) == (1, 0.1)
    flags = stand_ins(tmp_path, SHAPES[name])
    pairs = str(tmp_path / "pairs.jsonl")
    posts = tmp_path / "posts.jsonl"
    posts.write_text(json.dumps({"prompt": "w1 w2", "completion": "w3"}) + "\n")
    flags += ["--eval_dataset_name", pairs, "--quality_dataset_name", str(posts), "--max_steps", "1"]
    flags += ["--losses", "dpo", "--seeds", "0", "--no-plots"]
    assert main(["compare", str(EXPERIMENTS / name), *flags]) == 0
    (trial,) = (tmp_path / "out" / "runs").iterdir()
    done = TrainResult.load(trial)
    assert done.summary["steps"] == 1
    trained = load_file(done.model_path / "adapter_model.safetensors")
    assert {key.split(".")[-3] for key in trained} == {"q_proj", "k_proj", "v_proj"}


def test_the_gradient_study_at_scale_runs(tmp_path: Path):
    flags = stand_ins(tmp_path, MistralConfig)
    assert main(["probe", str(EXPERIMENTS / "scale/probe_mistral.yaml"), *flags]) == 0
    assert len(RunFolder.open(tmp_path / "out").pairs()) == 12
