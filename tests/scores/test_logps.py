"""Log-probs: by hand from full logits, whatever the padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entangle.scores import AutogradEngine, FactoredEngine, row_logps, token_logps
from entangle.scores.logps import Rows, scored_logps
from entangle.scores.rows import RowBatch
from tests.architectures import random_batch, select, tiny_model, trainable, with_lora

NAMES = ["llama", "gpt2", "gemma2", "cohere", "granite", "opt", "bloom", "falcon"]


def by_hand(model: nn.Module, batch: RowBatch) -> torch.Tensor:
    """One unpadded row at a time, full logits, log-softmax over the vocabulary."""
    grid = torch.zeros(batch.scored.shape, dtype=torch.float64)
    for i, (ids, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        row = ids[mask.bool()]
        logps = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
        columns = mask.nonzero()[1:, 0]  # of the tokens that have a token before them
        for k, column in enumerate(columns):
            if batch.completion_mask[i, column]:
                grid[i, column - 1] = logps[k, row[k + 1]]
    return grid


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_full_logits_of_single_rows(name: str, side: str) -> None:
    """Soft-capping (Gemma 2) and logit scales (Cohere, Granite) included; learned positions (GPT-2) too."""
    model = tiny_model(name)
    batch = random_batch(side=side)
    with torch.no_grad():
        expected = by_hand(model, batch)
        torch.testing.assert_close(token_logps(model, batch), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(row_logps(model, batch), expected.sum(1), rtol=0, atol=5e-6)


def test_float64_digits() -> None:
    """Where nothing drops to float32 (GPT-2), to the last digits."""
    model, batch = tiny_model("gpt2"), random_batch(side="left")
    with torch.no_grad():
        torch.testing.assert_close(token_logps(model, batch), by_hand(model, batch), rtol=0, atol=1e-12)


def test_padding_and_neighbours_change_nothing() -> None:
    """Nothing but the order in which a row's log-probs are summed."""
    model = tiny_model("gpt2")
    narrow, wide, left = (
        random_batch(side=side, padding=padding)
        for side, padding in (("right", 0), ("right", 9), ("left", 4))
    )
    torch.testing.assert_close(row_logps(model, wide), row_logps(model, narrow), rtol=0, atol=1e-13)
    torch.testing.assert_close(row_logps(model, left), row_logps(model, narrow), rtol=0, atol=1e-13)
    single = torch.cat([row_logps(model, select(narrow, [i], 1)) for i in range(6)])
    torch.testing.assert_close(single, row_logps(model, narrow), rtol=0, atol=1e-12)


def test_head_runs_at_scored_positions_only() -> None:
    """The number of positions that the head sees is the largest number of scored tokens of a row."""
    model, batch = tiny_model("llama"), random_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    row_logps(model, batch)
    assert seen == [int(batch.lengths.max())]


def test_head_out_of_reach() -> None:
    """Without output embeddings to hook, the model's own full logits serve."""
    model, batch = tiny_model("llama"), random_batch()
    expected = row_logps(model, batch)
    model.get_output_embeddings = lambda: None
    torch.testing.assert_close(row_logps(model, batch), expected, rtol=0, atol=1e-12)


def test_eval_mode_is_forced_and_restored() -> None:
    """LoRA dropout is off; a submodule that was in eval mode stays so."""
    model, batch = with_lora(tiny_model("llama"), lora_dropout=0.5), random_batch()
    expected = row_logps(model, batch)
    model.train()
    inner = model.get_base_model().model.layers[0]
    inner.eval()
    torch.testing.assert_close(row_logps(model, batch), expected, rtol=0, atol=0)
    assert model.training and not inner.training


def test_rows_without_scored_tokens() -> None:
    """They have log-prob 0, and don't disturb the others."""
    model, batch = tiny_model("llama"), random_batch()
    empty = batch.completion_mask.clone()
    empty[1] = 0
    cut = RowBatch(batch.input_ids, batch.attention_mask, empty, batch.prompt_length)
    expected = row_logps(model, batch)
    expected[1] = 0
    torch.testing.assert_close(row_logps(model, cut), expected, rtol=0, atol=1e-12)


def test_selected_rows_are_cut_to_their_length() -> None:
    """`Rows[...]` keeps what the rows need and nothing else."""
    model, batch = tiny_model("llama"), random_batch(padding=5)
    rows = Rows.from_batch(batch)
    with torch.no_grad():
        whole = scored_logps(model, rows).sum(1)
        for i in range(len(rows)):
            part = rows[i : i + 1]
            assert part.input_ids.shape[1] == int(batch.attention_mask[i].sum()) - 1
            torch.testing.assert_close(scored_logps(model, part).sum(1), whole[i : i + 1], rtol=0, atol=1e-12)


def test_prompt_tuning_is_refused() -> None:
    """Virtual tokens would shift every position."""
    from peft import PromptTuningConfig, get_peft_model

    from entangle.errors import UserError

    model = get_peft_model(
        tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UserError, match="PROMPT_TUNING"):
        row_logps(model, random_batch())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_models_patched_by_trl(name: str) -> None:
    """TRL's trainers replace the model's forward (a head fused with the loss); the old path stays."""
    utils = pytest.importorskip("trl.trainer.utils")
    model, batch = with_lora(tiny_model(name)), random_batch()
    expected = row_logps(model, batch)
    utils.add_fused_lm_head(model.get_base_model())
    assert "forward" in vars(model.get_base_model())
    torch.testing.assert_close(row_logps(model, batch), expected, rtol=0, atol=0)
    parameters = trainable(model)
    fast, slow = (engine(model, parameters).gram(batch) for engine in (FactoredEngine, AutogradEngine))
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
