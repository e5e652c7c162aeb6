"""What entangle.training takes for granted about TRL, for trl >= 1.16, < 2: a breaking upgrade fails here.

Each test looks at TRL's own trainer. Who widens the version range adds what changed, with its range.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from trl import DPOConfig, DPOTrainer

from entangle.training import LOSS_OPTIONS, NOT_FOR_THE_MODEL
from tests.training import runs


@pytest.fixture
def trainer(tmp_path: Path) -> DPOTrainer:
    """TRL's own trainer."""
    return runs.trainer(tmp_path, DPOTrainer)


def fused(trainer: DPOTrainer, batch: dict[str, Tensor]) -> Any:
    """The call that `compute_loss` makes."""
    columns = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return trainer.model(**columns, use_cache=False, labels=labels, fused_lm_head=True)


def test_version() -> None:
    """The range that pyproject.toml states."""
    assert Version("1.16") <= Version(version("trl")) < Version("2")


def test_signatures() -> None:
    """The methods we override or call, and the constructor's arguments."""
    names = list(inspect.signature(DPOTrainer.compute_loss).parameters)
    assert names == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]
    assert list(inspect.signature(DPOTrainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"]
    assert list(inspect.signature(DPOTrainer.__init__).parameters) == [
        "self",
        "model",
        "ref_model",
        "args",
        "data_collator",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "compute_metrics",
        "callbacks",
        "optimizers",
        "quantization_config",
        "peft_config",
    ]


def test_options_of_the_loss() -> None:
    """Every option that we refuse exists; TRL has no further one that would change a loss silently."""
    names = {f.name for f in fields(DPOConfig)}
    assert set(LOSS_OPTIONS) <= names
    words = ("loss", "divergence", "label_smooth", "weighting", "alpha", "tau")
    others = {name for name in names if any(word in name for word in words)} - set(LOSS_OPTIONS)
    # none of these is a preference loss, and DPOTrainer never calls transformers' label smoother
    assert others <= {
        "average_tokens_across_devices",
        "label_smoothing_factor",
        "neftune_noise_alpha",
        "prediction_loss_only",
        "ref_model_mixup_alpha",
        "router_aux_loss_coef",
    }
    assert {"beta", "precompute_ref_log_probs", "sync_ref_model"} <= names
    assert DPOConfig.beta == 0.1


def test_attributes(trainer: DPOTrainer) -> None:
    """What `compute_loss` and the metrics read from the trainer."""
    assert trainer.aux_loss_enabled is False
    assert isinstance(trainer.router_aux_loss_coef, float)
    assert trainer.precompute_ref_logps is False
    assert trainer.ref_model is None
    assert trainer._tp_size == 1
    assert trainer._total_train_tokens == 0
    assert trainer.loss_is_scaled_for_ga is False  # else our per-micro-batch mean would be scaled twice
    assert isinstance(trainer._name, str) and isinstance(trainer._paper, dict)


def test_batch(tmp_path: Path) -> None:
    """Chosen rows, then rejected, right-padded; the completion mask counts the end of sequence."""
    trainer = runs.trainer(tmp_path, DPOTrainer, args={"precompute_ref_log_probs": True})
    batch = runs.collated(trainer, range(3))
    assert set(batch) == {"input_ids", "attention_mask", *NOT_FOR_THE_MODEL}
    for i, row in enumerate(trainer.train_dataset.select(range(3))):
        for side, at in (("chosen", i), ("rejected", 3 + i)):
            prompt, response = row["prompt_ids"], row[f"{side}_ids"]
            length = len(prompt + response)
            assert batch["input_ids"][at, :length].tolist() == prompt + response
            assert batch["attention_mask"][at].sum() == length
            assert batch["completion_mask"][at].nonzero().flatten().tolist() == list(
                range(len(prompt), length)
            )
            assert response[-1] == trainer.processing_class.eos_token_id
    assert batch["ref_chosen_logps"].shape == batch["ref_rejected_logps"].shape == (3,)


def test_fused_head(trainer: DPOTrainer, tmp_path: Path) -> None:
    """Per-token log-probs `(2B, T-1)`, 0 where nothing is scored, with what the metrics read; no logits."""
    batch = runs.collated(trainer, range(3))
    output = fused(trainer, batch)
    with torch.no_grad():
        _, tokens = runs.plain_logps(runs.policy(), batch)
    torch.testing.assert_close(output.log_probs, tokens, rtol=1e-5, atol=1e-5)
    assert output.log_probs.requires_grad
    for name in ("entropy", "mean_logits", "is_top1"):
        assert getattr(output, name).shape == tokens.shape
    assert output.log_sum_sq_probs is None and output.aux_loss is None
    weighted = runs.trainer(tmp_path, DPOTrainer, args={"use_weighting": True})
    assert fused(weighted, batch).log_sum_sq_probs.shape == tokens.shape


def test_reference(trainer: DPOTrainer) -> None:
    """`compute_ref_log_probs` calls the given model once, by keywords, without gradient, and sums."""
    batch = runs.collated(trainer, range(3))
    seen = []

    def recorded(**columns: Any) -> Any:
        seen.append((set(columns), torch.is_grad_enabled(), trainer.model(**columns)))
        return seen[-1][-1]

    chosen, rejected = trainer.compute_ref_log_probs(recorded, batch)
    ((columns, with_gradient, output),) = seen
    assert columns == {"input_ids", "attention_mask", "use_cache", "labels", "fused_lm_head"}
    assert not with_gradient
    assert torch.equal(torch.cat([chosen, rejected]), output.log_probs.sum(1))


def test_given_reference_model_is_used(tmp_path: Path) -> None:
    """A reference model that's given is kept, with the fused head; no adapter copy is made beside it."""
    given = runs.policy(seed=1)
    trainer = runs.trainer(tmp_path, DPOTrainer, ref_model=given)
    assert trainer.ref_model is given
    assert list(trainer.model.peft_config) == ["default"]
    assert "fused_lm_head" in inspect.signature(given.forward, follow_wrapped=False).parameters


def test_metrics_buffer(tmp_path: Path) -> None:
    """Names hold lists in `_metrics[mode]`; a log row has their means, `eval_` before them in evaluation."""

    class Counting(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["ours/calls"].append(len(self._metrics[mode]["ours/calls"]))
            return super().compute_loss(model, inputs, *rest, **options)

    args = {
        "max_steps": 2,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 2,
    }
    done = runs.trainer(tmp_path, Counting, args=args, eval_dataset=runs.pairs(6))
    done.train()
    assert runs.logged(done, "ours/calls") == [1.5]  # four micro-batches: 0, 1, 2, 3
    assert runs.logged(done, "eval_ours/calls") == [1.0]  # three batches: 0, 1, 2
    assert set(done._metrics) == {"train", "eval"}
    assert not done._metrics["train"]
