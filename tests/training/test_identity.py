"""With `DPO()` a run is TRL's own run, bit for bit, and its log says the same things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from trl import DPOTrainer

from entangle.training import PreferenceTrainer
from losses import DPO
from tests.processes import run_on_two
from tests.training import runs

COLUMNS = ("prompt", "chosen", "rejected")


def mixture_of_experts() -> dict[str, Any]:
    """A tiny Mixtral: TRL asks for its router's logits and adds the load-balancing loss."""
    config = MixtralConfig(
        vocab_size=43,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        pad_token_id=0,
        eos_token_id=1,
        router_aux_loss_coef=0.1,
    )
    torch.manual_seed(0)
    return {"model": MixtralForCausalLM(config)}


def virtual_tokens() -> dict[str, Any]:
    """Prompt tuning, which puts tokens of its own before every row."""
    return {"peft_config": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)}


SETTINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, dict),
    "accumulation": ({"gradient_accumulation_steps": 2}, dict),
    "short_last_batch": ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, dict),
    "precomputed_reference": ({"precompute_ref_log_probs": True}, dict),
    "bf16_and_checkpointing": ({"bf16": True, "gradient_checkpointing": True}, dict),
    "truncated": ({"max_length": 9}, dict),
    "second_model": ({}, lambda: {"ref_model": runs.policy(seed=1), "peft_config": None}),
    "ready_adapter": ({}, lambda: {"model": get_peft_model(runs.policy(), runs.LORA), "peft_config": None}),
    "mixture_of_experts": ({}, mixture_of_experts),
    "virtual_tokens": ({}, virtual_tokens),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_dpo_is_bit_identical_to_trl(setting: str, tmp_path: Path) -> None:
    """Equal md5 of the trained weights after 20 steps, and equal losses at every step."""
    args, options = SETTINGS[setting]
    theirs = runs.trainer(tmp_path, DPOTrainer, args=args, **options())
    before = runs.digest(theirs.model)
    theirs.train()
    ours = runs.trainer(tmp_path, args=args, loss=DPO(), **options())
    ours.train()
    assert runs.digest(ours.model) == runs.digest(theirs.model) != before
    assert runs.logged(ours, "loss") == runs.logged(theirs, "loss")
    assert len(runs.logged(ours, "loss")) == 20
    assert len(runs.logged(ours, "aux_loss")) == (20 if setting == "mixture_of_experts" else 0)
    assert runs.logged(ours, "aux_loss") == runs.logged(theirs, "aux_loss")


def test_another_beta_is_another_run(tmp_path: Path) -> None:
    """The digest tells runs apart: without this the law above could hold for want of looking."""
    digests = set()
    for loss in (DPO(), DPO(beta=0.11)):
        done = runs.trainer(tmp_path, loss=loss)
        done.train()
        digests.add(runs.digest(done.model))
    assert len(digests) == 2


@pytest.mark.parametrize("precompute", [False, True])
def test_every_metric_of_trl_is_logged_with_its_value(precompute: bool, tmp_path: Path) -> None:
    """Train and eval rows hold all of TRL's keys; values agree but for the order of a float32 sum."""
    rows = []
    for cls in (DPOTrainer, PreferenceTrainer):
        args = {
            "max_steps": 4,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "precompute_ref_log_probs": precompute,
        }
        done = runs.trainer(tmp_path, cls, args=args, eval_dataset=runs.pairs(6))
        done.train()
        rows.append(done.state.log_history)
    clock = ("runtime", "per_second")
    for theirs, ours in zip(*rows, strict=True):
        wanted = {key: value for key, value in theirs.items() if not key.endswith(clock)}
        assert {key: ours.get(key) for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_real_pairs_on_a_real_model(tldr: Path, small_llama: Path, tmp_path: Path) -> None:
    """The same law on real TL;DR pairs with a trained model, TRL's truncation included."""
    rows = map(json.loads, (tldr / "tldr_pairs.jsonl").read_text().splitlines())
    short = sorted(({key: row[key] for key in COLUMNS} for row in rows), key=lambda row: len(row["prompt"]))
    data = Dataset.from_list(short[:12])
    digests = set()
    for cls in (DPOTrainer, PreferenceTrainer):
        options = {
            "model": AutoModelForCausalLM.from_pretrained(small_llama),
            "processing_class": AutoTokenizer.from_pretrained(small_llama),
        }
        args = {"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 500}  # the model reads 512
        done = runs.trainer(tmp_path, cls, args=args, train_dataset=data, **options)
        done.train()
        digests.add(runs.digest(done.model))
        assert len(done.train_dataset) > 5
    assert len(digests) == 1


@pytest.mark.slow
def test_two_processes_are_bit_identical_to_trl(tmp_path: Path) -> None:
    """DDP on gloo with accumulation 2: equal weights on both ranks and in both trainers, equal logs.

    A mitigation's moving average is that of one process with the same pairs.
    """
    run_on_two("tests.training.ddp_run", str(tmp_path))
    answer = json.loads((tmp_path / "answer.json").read_text())
    theirs, ours = answer["DPOTrainer"], answer["PreferenceTrainer"]
    assert len(theirs["digests"]) == len(ours["digests"]) == 2
    assert len({*ours["digests"], *theirs["digests"]}) == 1
    assert {key: ours["log"][key] for key in theirs["log"]} == pytest.approx(
        theirs["log"], rel=1e-5, abs=1e-6
    )
    single = runs.calibrated(tmp_path / "single", per_device_train_batch_size=4)
    assert answer["averages"] == pytest.approx([single, single], rel=1e-4)
    assert len(set(answer["averages"])) == 1
