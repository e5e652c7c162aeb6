"""A policy with fused LoRA kernels is measured through its layers, or refused by name; it is given back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

import entangle as en
from entangle.scores import make_engine
from entangle.scores.fused import FusedLora, fused_calls, plain_lora
from entangle.training import EntanglementCallback, TrainingError
from tests import fused
from tests.training import runs
from tests.training.callback_runs import are_same_run, train

PAIRS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7 w8"},
    {"prompt": "w9 w2", "chosen": " w4 w5 w11 w12", "rejected": " w4 w6"},
]

LONG = [
    {"prompt": " ".join(f"w{i}" for i in range(30)), "chosen": " w4 w5", "rejected": " w6 w7 w8"},
    {"prompt": " ".join(f"w{i}" for i in range(2, 30)), "chosen": " w4 w5 w11", "rejected": " w4 w6"},
]
"""Prompts so long that sharing them pays."""

KINDS = {"axolotl": fused.fuse_as_axolotl, "unsloth": fused.fuse_as_unsloth}


def functions(model: Any) -> list[Any]:
    return [vars(call.module)[call.slot] for call in fused_calls(model)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_model_is_the_same_function_and_calls_no_layer(kind: str) -> None:
    plain, model = fused.policy(), KINDS[kind](fused.policy())
    ids, seen = torch.arange(3, 12)[None], []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert not seen
    with plain_lora(model):
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert len(seen) == 7 * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_goes_through_the_layers_and_puts_the_kernels_back(kind: str) -> None:
    model = KINDS[kind](fused.policy())
    before = functions(model)
    found, expected = (
        en.probe(en.Policy.of(m, runs.tokenizer()), PAIRS, losses=["dpo"]).pairs
        for m in (model, fused.policy())
    )
    columns = ["logps_chosen", "logps_rejected", "sq_chosen", "sq_rejected", "inner"]
    pd.testing.assert_frame_equal(found[columns], expected[columns], rtol=1e-12)
    after = functions(model)
    assert len(before) == 6 and all(a is b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_with_kernels_is_probed_and_not_changed(kind: str, tmp_path: Path) -> None:
    def done(name: str, callback: EntanglementCallback | None, fuse: Any = KINDS[kind]) -> Any:
        policy: Any = fuse(fused.policy())
        return train(
            tmp_path / name, callback, model=policy, peft_config=None, loss={"name": "simpo", "beta": 2.0}
        )

    assert are_same_run(done("without", None), done("with", EntanglementCallback(4, every=3)))
    done("layers", EntanglementCallback(4, every=3), lambda model: model)
    there, here = (pd.read_parquet(tmp_path / n / "entangle" / "steps.parquet") for n in ("with", "layers"))
    first = here["step"] == 0
    pd.testing.assert_frame_equal(there[first], here[first])


def test_what_reads_the_layers_own_calls_refuses_and_names_the_flags(tmp_path: Path) -> None:
    model = fused.fuse_as_axolotl(fused.policy())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch = en.Policy.of(fused.policy(), runs.tokenizer()).collate(
        en.Policy.of(model, runs.tokenizer()).tokenize(en.load_pairs(PAIRS)).tokens
    )
    flags = "lora_qkv_kernel: false, lora_o_kernel: false, lora_mlp_kernel: false"
    for engine in ("factored", "autograd"):
        with pytest.raises(FusedLora, match=flags):
            make_engine(model, parameters, engine).pairs(batch)
    with pytest.raises(TrainingError, match=flags):
        train(tmp_path, EntanglementCallback(live=True), model=model, peft_config=None)


def test_a_fused_function_without_a_known_plain_path_is_refused() -> None:
    model = fused.policy()
    attention = model.get_base_model().model.layers[0].self_attn
    attention.apply_out_proj = lambda x: x
    with pytest.raises(FusedLora, match="apply_out_proj.*lora_o_kernel: false"), plain_lora(model):
        raise AssertionError
    del attention.apply_out_proj
    attention.apply_qkv = (
        attention.forward
    )  # axolotl's own plain function, as it stands where a kernel is off
    assert fused_calls(model) == []


def test_a_backward_pass_that_overwrites_what_it_saved_is_noticed() -> None:
    """The graph of a shared prompt is walked once per response; through such a kernel only the first time is right."""
    found = {}
    for name, model in (("overwriting", fused.overwrite_in_mlps(fused.policy())), ("plain", fused.policy())):
        policy = en.Policy.of(model, runs.tokenizer())
        batch = policy.collate(policy.tokenize(en.load_pairs(LONG)).tokens)
        with policy.ready():
            engine = make_engine(model, policy.parameters)
            found[name] = engine.pairs(batch).geometry
            assert any("prompts are evaluated with every response" in n for n in engine.notes) == (
                name != "plain"
            )
    for column in ("sq_chosen", "sq_rejected", "inner"):
        torch.testing.assert_close(
            getattr(found["overwriting"], column), getattr(found["plain"], column), rtol=1e-4, atol=0
        )
