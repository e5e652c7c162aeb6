"""The geometry read off a training step's own backward pass is the scores' geometry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from entangle.analysis.geometry import GEOMETRY_COLUMNS, PairGeometry
from entangle.scores.autograd import AutogradEngine
from entangle.scores.rows import RowBatch
from entangle.training import TrainingError
from entangle.training.live import BatchRecorder, MicroBatch, pair_key
from entangle.training.training_set import training_pairs
from losses import DPO
from tests.training import runs

BATCH = [0, 3, 5, 9]


def stepped(folder: Path, accumulation: int = 2, **options: Any) -> tuple[Any, dict[str, Tensor], MicroBatch]:
    """A trainer after the forward and backward of one micro-batch, the batch, and what was seen of it.

    The LoRA's B is random, so that both of its factors have scores.
    """
    args = {"learning_rate": 1e-3} | options.pop("args", {})
    done = runs.trainer(folder, args=args, **options)
    done.create_optimizer_and_scheduler(1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in done.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    batch = runs.collated(done, BATCH)
    done.current_gradient_accumulation_steps = accumulation
    done.model.train()
    recorder = BatchRecorder(done.model, geometry=True)
    done.training_step(done.accelerator.prepare_model(done.model), dict(batch))
    (seen,) = recorder.take()
    recorder.remove()
    return done, batch, seen


def oracle(done: Any, batch: dict[str, Tensor]) -> PairGeometry:
    """The same pairs by plain autograd, a row at a time, without the autocast of training."""
    done.model.__dict__.pop("forward", None)
    rows = RowBatch(
        **{k: batch[k] for k in ("input_ids", "attention_mask", "completion_mask")},
        prompt_length=torch.ones(len(BATCH), dtype=torch.long),
    )
    parameters = {name: p for name, p in done.model.named_parameters() if p.requires_grad}
    return AutogradEngine(done.model, parameters).pairs(rows).geometry


def errors(found: PairGeometry, expected: PairGeometry) -> Tensor:
    scale = (expected.sq_chosen * expected.sq_rejected).sqrt()
    return torch.stack([(getattr(found, n) - getattr(expected, n)).abs() / scale for n in GEOMETRY_COLUMNS])


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"args": {"gradient_checkpointing": True}},
    "reentrant": {
        "args": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    },
    "another_loss": {"loss": {"name": "simpo", "beta": 2.0}},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_geometry_equals_plain_autograd(setting: str, tmp_path: Path) -> None:
    done, batch, seen = stepped(tmp_path, **SETTINGS[setting])
    assert seen.is_known.all()
    assert errors(seen.geometry, oracle(done, batch)).max() < 1e-5
    assert seen.geometry.resolution == 1e-6


def test_half_precision_agrees_within_its_resolution(tmp_path: Path) -> None:
    done, batch, seen = stepped(tmp_path, args={"bf16": True, "gradient_checkpointing": True})
    assert seen.geometry.resolution == 1.2e-2
    assert errors(seen.geometry, oracle(done, batch)).max() < 0.1


def test_full_parameters_with_a_frozen_head(tmp_path: Path) -> None:
    """Linear layers, norms and the embedding; a trained head is refused, since TRL reads it past its layer."""
    model = runs.policy()
    model.lm_head.weight.requires_grad_(False)
    done, batch, seen = stepped(tmp_path, model=model, ref_model=runs.policy(1), peft_config=None)
    assert errors(seen.geometry, oracle(done, batch)).max() < 1e-5
    with pytest.raises(TrainingError, match=r"lm_head\.weight"):
        stepped(tmp_path, model=runs.policy(), ref_model=runs.policy(1), peft_config=None)


def test_pushes_and_logps_are_those_of_the_loss(tmp_path: Path) -> None:
    """The upstream gradient u is d loss / d logp, with the mean over the batch and over the accumulation."""
    done, batch, seen = stepped(tmp_path, accumulation=5)
    logps, _ = runs.plain_logps(done.model, batch)
    assert seen.logps is not None and seen.upstream is not None
    assert torch.allclose(seen.logps, logps, atol=1e-4)
    with done.model.disable_adapter():
        reference, _ = runs.plain_logps(done.model, batch)
    leaves = logps.detach().requires_grad_()
    ratios = leaves - reference.detach()
    chosen, rejected = ratios.chunk(2)
    loss = -torch.nn.functional.logsigmoid(DPO().beta * (chosen - rejected)).mean() / 5
    (expected,) = torch.autograd.grad(loss, leaves)
    assert torch.allclose(seen.upstream, expected, rtol=1e-4)


def test_a_row_without_push_is_unknown(tmp_path: Path) -> None:
    """SFT has no gradient in a rejected response: nothing is known of it, and nothing is made up."""
    done, batch, seen = stepped(tmp_path, loss="sft")
    assert seen.is_known.tolist() == [True] * 4 + [False] * 4
    expected = oracle(done, batch)
    assert torch.allclose(seen.geometry.sq_chosen, expected.sq_chosen, rtol=1e-4)
    assert seen.geometry.sq_rejected.isnan().all() and seen.geometry.inner.isnan().all()


def test_a_loss_that_weighs_tokens_gives_no_push(tmp_path: Path) -> None:
    _, _, seen = stepped(tmp_path, loss={"name": "ld_dpo", "alpha": 0.5})
    assert seen.upstream is not None and seen.upstream.isnan().any()
    assert seen.geometry.inner[(seen.upstream.isnan()).view(2, -1).any(0)].isnan().all()


def test_pairs_are_recognised_in_a_batch(tmp_path: Path) -> None:
    done, _, seen = stepped(tmp_path)
    known = {pair_key(pair): pair.index for pair in training_pairs(done.train_dataset, 16)}
    assert [known[key] for key in seen.keys()] == BATCH


def test_a_paused_watch_sees_nothing(tmp_path: Path) -> None:
    done = runs.trainer(tmp_path)
    done.create_optimizer_and_scheduler(1)
    done.current_gradient_accumulation_steps = 1
    recorder = BatchRecorder(done.model, geometry=True)
    batch = runs.collated(done, BATCH)
    with recorder.paused():
        done.training_step(done.model, dict(batch))
    assert recorder.take() == []


def test_a_routers_own_loss_is_refused(tmp_path: Path) -> None:
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
    with pytest.raises(TrainingError, match="router"):
        stepped(tmp_path, model=MixtralForCausalLM(config))
