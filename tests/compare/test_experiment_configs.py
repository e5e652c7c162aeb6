"""The YAML files of the experiments are read by the commands they are for; those of real scale are dry-run offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from entangle.compare import cells_of
from entangle.config import CompareConfig, ProbeConfig, TrainConfig, build_losses, parse
from entangle.training.arguments import trainer_arguments

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"

RUNS = {
    "compare/tldr.yaml": 36, "compare/mitigations.yaml": 15, "suffix/suffix.yaml": 3, "scale/tldr_mistral.yaml": 36,
    "scale/tldr_llama3.yaml": 36,
}  # fmt: skip
"""Comparisons with the number of their runs."""


def read(cls: type, name: str):
    config, ignored = parse(cls, ["--config", str(EXPERIMENTS / name)], prog="test")
    assert not ignored
    return config


@pytest.mark.parametrize("name", RUNS)
def test_comparisons_are_read_and_every_run_can_be_set_up(name: str, tmp_path: Path):
    config = read(CompareConfig, name)
    cells = cells_of(config)
    assert len(cells) == len({cell.train.output_dir for cell in cells}) == RUNS[name]
    assert len(config.losses) == len({loss.label for loss in build_losses(config.losses)})
    arguments = trainer_arguments(cells[0].train, tmp_path)  # TRL's own checks
    assert arguments.learning_rate == config.learning_rate


@pytest.mark.parametrize(
    ("cls", "name"),
    [(TrainConfig, "early_warning/train.yaml"), (ProbeConfig, "scale/probe_mistral.yaml")],
)
def test_other_configs_are_read(cls: type, name: str):
    read(cls, name)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("scale/")])
def test_scale_is_the_released_recipe(name: str):
    """The released settings of arXiv 2410.13828, and modules that its two models have."""
    config = read(CompareConfig, name)
    assert (config.lora_r, config.lora_alpha, config.learning_rate) == (64, 128, 5e-6)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (2, 4)
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape = MistralConfig if "mistral" in name else LlamaConfig
    model = AutoModelForCausalLM.from_config(shape(**small, num_attention_heads=2, num_key_value_heads=1))
    lora = LoraConfig(r=config.lora_r, target_modules=list(config.lora_target_modules), task_type="CAUSAL_LM")
    trained = [n for n, p in get_peft_model(model, lora).named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3
