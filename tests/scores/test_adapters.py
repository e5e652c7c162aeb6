"""Every form that a LoRA adapter takes, against the oracle; and the identity that LoRA scores obey."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from entangle.errors import UserError
from entangle.scores import AutogradEngine, FactoredEngine, UncoveredParameter
from entangle.scores.lora import foldable
from tests.architectures import random_batch, tiny_model, trainable, with_lora
from tests.scores.test_architectures import pair_error, relative_error

ADAPTERS: dict[str, tuple[str, dict, set[str]]] = {
    "rslora": ("llama", {"use_rslora": True}, set()),
    "patterns": (
        "llama",
        {"alpha_pattern": {"q_proj": 9}, "rank_pattern": {"v_proj": 2}, "target_modules": r".*\.[qv]_proj"},
        set(),
    ),
    "bias_of_base": ("llama_biased", {"bias": "all"}, set()),
    "lora_bias": ("llama_biased", {"lora_bias": True}, set()),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}, set()),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}, set()),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, set()),
    "scaled_embedding": ("gemma3", {"target_modules": ["embed_tokens"]}, set()),
    "padded_embedding": ("llama_padded", {"target_modules": ["embed_tokens"]}, set()),
    "head": ("llama", {"target_modules": ["lm_head", "o_proj"]}, set()),
    "tied_head": ("llama_tied", {"target_modules": ["lm_head"]}, set()),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}, set()),
    "dora_conv1d": ("gpt2", {"use_dora": True, "target_modules": ["c_attn"]}, set()),
    "dora_embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens"]}, {"embed_tokens"}),
    "trainable_tokens": (
        "llama",
        {"trainable_token_indices": [3, 4], "target_modules": ["q_proj"]},
        {"embed_tokens"},
    ),
}
"""Architecture, LoRA options, and the modules whose parameters go by the fallback."""

FOLDED_NOWHERE = {
    "scaled_embedding",
    "padded_embedding",
    "tied_head",
    "dora",
    "dora_conv1d",
    "dora_embedding",
}


def adapted(name: str) -> nn.Module:
    """The model of a case."""
    architecture, options, _ = ADAPTERS[name]
    if architecture == "llama_padded":
        base = tiny_model("llama", pad_token_id=int(random_batch().input_ids[0, 0]))
    else:
        base = tiny_model(architecture)
    return with_lora(base, **options)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("name", ADAPTERS)
def test_equals_the_oracle(name: str, share_prompts: bool) -> None:
    """Float64; what isn't covered is what the table says."""
    model, batch = adapted(name), random_batch()
    parameters = trainable(model)
    engine = FactoredEngine(model, parameters, fallback=True, share_prompts=share_prompts)
    oracle = AutogradEngine(model, parameters)
    tolerance = 1e-6 if name == "scaled_embedding" else 1e-12
    assert pair_error(engine.pairs(batch, modules=True), oracle.pairs(batch, modules=True)) < tolerance
    assert relative_error(engine.gram(batch), oracle.gram(batch)) < tolerance
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    torch.testing.assert_close(
        engine.products(batch, direction), oracle.products(batch, direction), rtol=1e-6, atol=1e-8
    )
    left = {n for n in parameters if any(part in n for part in ADAPTERS[name][2])}
    assert set(parameters) - engine.covered == left
    assert bool(foldable(model)) == (name not in FOLDED_NOWHERE)


def test_every_adapter_of_several_counts() -> None:
    """Two active adapters with their own scaling, both probed; then only one of them active."""
    model = with_lora(tiny_model("llama"), target_modules=["q_proj", "v_proj"])
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=7, target_modules=["v_proj", "o_proj"]))
    model = model.double()
    for name, parameter in model.named_parameters():
        if "second" in name:
            nn.init.normal_(parameter, std=0.2)
    model.base_model.set_adapter(["default", "second"])
    probed = {n: p for n, p in model.named_parameters() if "lora_" in n}
    batch = random_batch()
    for active in (["default", "second"], ["second"]):
        model.base_model.set_adapter(active)
        fast, slow = FactoredEngine(model, probed), AutogradEngine(model, probed)
        assert pair_error(fast.pairs(batch, modules=True), slow.pairs(batch, modules=True)) < 1e-12


def test_lora_identity() -> None:
    """<g_a, g_b> = sum s^2 (<B^T G_a, B^T G_b> + <G_a A^T, G_b A^T>), G the scores of the base weights."""
    model, batch = with_lora(tiny_model("llama"), target_modules=["q_proj", "down_proj"]), random_batch()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    weights = {n: m.get_base_layer().weight for n, m in layers.items()}
    full = AutogradEngine(model, weights).scores(batch)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for name, layer in layers.items():
        scores = full[name].view(6, *weights[name].shape)
        a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        for part in (s * b.T @ scores, s * scores @ a.T):
            expected += part.flatten(1).detach() @ part.flatten(1).detach().T
    engine = FactoredEngine(model, trainable(model))
    torch.testing.assert_close(engine.gram(batch), expected, rtol=1e-10, atol=1e-10)


def test_score_of_a_is_zero_at_initialisation() -> None:
    """B = 0: only B has a score."""
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=3, target_modules=["q_proj"])).double()
    modules = FactoredEngine(model, trainable(model)).pairs(random_batch(), modules=True).modules
    assert modules is not None
    for name, block in modules.items():
        assert (block.sq_chosen == 0).all() == ("lora_A" in name)


@pytest.mark.parametrize("adapters_in_float32", [True, False])
def test_half_precision_is_never_folded(adapters_in_float32: bool) -> None:
    """A bfloat16 base, adapters in float32 (PEFT's default) or not: right within bfloat16, and it says so."""
    exact = with_lora(tiny_model("llama", torch.bfloat16))
    exact = exact.double()  # the same rounded weights
    model = with_lora(tiny_model("llama", torch.bfloat16)).bfloat16()
    if adapters_in_float32:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    assert foldable(model) == []
    batch = random_batch()
    engine = FactoredEngine(model, trainable(model))
    error = relative_error(engine.gram(batch), AutogradEngine(exact, trainable(exact)).gram(batch))
    assert error < 0.1
    assert engine.resolution == engine.pairs(batch).geometry.resolution == 1.2e-2
    assert engine.notes == []


def test_folding_gives_the_very_weights_back() -> None:
    """Storage and bits, also when the pass fails; and a tied weight isn't folded into its other use."""
    model = with_lora(tiny_model("llama", torch.float32))
    weights = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    engine = FactoredEngine(model, trainable(model))
    engine.pairs(random_batch())
    model.get_base_model().model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.pairs(random_batch())
    for name, parameter in model.named_parameters():
        pointer, value = weights[name]
        assert parameter.data_ptr() == pointer and torch.equal(parameter, value), name
    assert not any(m.merged for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


def test_switched_off_or_merged_adapters_are_refused() -> None:
    """Their scores would all be zero without a word."""
    model = with_lora(tiny_model("llama"))
    engine, batch = FactoredEngine(model, trainable(model)), random_batch()
    with model.disable_adapter(), pytest.raises(UserError, match="switched off"):
        engine.pairs(batch)
    engine.pairs(batch)
    model.merge_adapter()
    with pytest.raises(UserError, match="merged into its layer"):
        engine.pairs(batch)
    with pytest.raises(UserError, match="merged into its layer"):
        FactoredEngine(model, trainable(model)).pairs(batch)


def test_uncovered_names_are_in_the_message() -> None:
    """Without fallback, trainable tokens are refused by name."""
    model = adapted("trainable_tokens")
    with pytest.raises(UncoveredParameter, match=r"1 of 5 parameters have no fast rule: .*embed_tokens"):
        FactoredEngine(model, trainable(model))
