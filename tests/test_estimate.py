"""The dry run's arithmetic of memory, against the very model that it speaks of. Times aren't tested here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from entangle.config import ProbeConfig
from entangle.data import tokenize_pair
from entangle.errors import ModelError
from entangle.measure.estimate import Cost, Stack, estimate, peak_bytes, resident
from entangle.measure.inputs import load_pairs_of, load_policy_of
from entangle.measure.passes import Measurement, column_functions, rows_of_pass
from entangle.measure.plan import Plan
from entangle.scores import make_engine
from tests.tiny import gpt2_tokenizer

CPU = torch.device("cpu")


def test_peak_counts_what_is_held_at_a_time():
    """2 MB that stay while 4 MB come and go, then 1 MB: at most 6 MB at a time, in any order of creation."""

    def compute() -> None:
        kept = torch.ones(500_000)
        torch.ones(1_000_000).sum()
        kept.add_(torch.ones(250_000).sum())

    assert peak_bytes(compute, CPU) == pytest.approx(6e6, rel=0.01)


def test_a_deeper_stack_costs_as_much_more_per_layer_as_the_last_ones():
    """Two layers cost 5, four cost 9: two each, 1 for the rest; ten layers, three times as far again, cost 21."""
    assert Cost(5.0, 50.0).deeper(Cost(9.0, 90.0), 3) == Cost(21.0, 210.0)


def test_memory_is_that_of_the_whole_model():
    """Counted on a random model, it is what the embedded policy's own first pass takes, with the engine's check."""
    config = ProbeConfig(limit=2, parameters="full", reference="self")
    found, policy = estimate(config), load_policy_of(config)
    assert found.weight_bytes == sum(p.nbytes for p in policy.model.parameters())
    pairs = [tokenize_pair(policy.tokenizer, pair, config.max_length) for pair in load_pairs_of(config)]
    largest = list(Plan.make(pairs, config.shard_size, config.batch_size).passes(0))[-1]
    measurement = Measurement(
        policy, make_engine(policy.model, policy.parameters), column_functions(config.diagnostics)
    )
    measured = resident(peak_bytes(lambda: rows_of_pass(largest, measurement), CPU), CPU)
    assert found.pass_bytes == pytest.approx(measured, rel=0.1)
    assert found.scored == 2 and found.seconds > 0


def test_rows_beyond_learned_positions_are_refused_before_the_run(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=352, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(shape).save_pretrained(tmp_path)
    gpt2_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Give --max_length 8"):
        estimate(ProbeConfig(model_name_or_path=str(tmp_path), reference="self", limit=2))


def test_noise_between_passes_of_one_size_is_not_drawn_out(monkeypatch):
    """A pass costs its tokens' share of the measured ones, though the largest happened to be the quicker of two."""
    config = ProbeConfig(limit=9, batch_size=2)
    costs = [Cost(1.0, 0.0), Cost(2.1, 0.0), Cost(2.0, 0.0)]
    monkeypatch.setattr(Stack, "costs", lambda self, first, further: costs[: 1 + len(further)])
    found = estimate(config)
    assert found.passes == 5 and 1 + 3 * 2.0 < found.seconds < 1 + 4 * 2.1
    assert estimate(replace(config, batch_size=9)).seconds == 1.0
