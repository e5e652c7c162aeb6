"""Loading policies, adapters and references, and the proof that a reference is what it claims to be."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from entangle.config import ModelOptions
from entangle.data import DataError, hub, load_pairs, tokenize_pair
from entangle.models import (
    ModelError,
    Policy,
    adapter_off,
    check_reference,
    choose_parameters,
    load_policy,
    pad_id,
    settle_reference,
)
from entangle.scores import make_engine
from entangle.scores.float64 import KeepFloat64
from entangle.scores.logps import row_logps, token_logps
from entangle.scores.rows import RowBatch
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The folder of a tiny Llama."""
    return tiny.save_policy(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    """The folder of a trained LoRA for it."""
    return tiny.save_adapter(tmp_path_factory.mktemp("adapter"), base)


def batch_of(policy: Policy, rows: Any = tiny.ROWS) -> RowBatch:
    """Three pairs as a batch for the policy."""
    return policy.collate([tokenize_pair(policy.tokenizer, pair, 40) for pair in load_pairs(rows)])


def trainable(policy: Policy) -> set[str]:
    """Names of the parameters that want a gradient."""
    return {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}


# --- what is loaded -----------------------------------------------------------------------------------------


def test_full_model(base):
    """Without an adapter every parameter is probed, in eval mode, and there is no reference."""
    policy = load_policy(ModelOptions(base))
    assert set(policy.parameters) == {n for n, _ in policy.model.named_parameters()} == trainable(policy)
    assert not any(module.training for module in policy.model.modules())
    assert policy.reference.logps(batch_of(policy)) is None
    assert policy.score_dtype == torch.float32 and policy.max_positions == 64
    assert policy.description["probed_kind"] == "full"
    assert policy.description["model_parameters"] == sum(p.numel() for p in policy.parameters.values())


def test_adapter_on_its_base_or_on_a_named_one(base, adapter):
    """An adapter's folder stands for its base and itself; its parameters are probed, and nothing else."""
    alone = load_policy(ModelOptions(adapter))
    named = load_policy(ModelOptions(base, adapter_name_or_path=adapter))
    batch = batch_of(alone)
    assert torch.equal(row_logps(alone.model, batch), row_logps(named.model, batch))
    assert alone.identity == named.identity
    assert all(".lora_" in name for name in alone.parameters) and len(alone.parameters) == 8
    assert trainable(alone) == set(alone.parameters)
    assert alone.description | {"probed_kind": "lora", "lora_r": 2, "adapter_base": base} == alone.description


@pytest.mark.parametrize(
    "dtype, score_dtype, computing",
    [
        ("float64", None, "float64"),
        ("bfloat16", None, "float32"),
        ("bfloat16", "float64", "float64"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float64", "float32", "float32"),
    ],
)
def test_dtype(base, adapter, dtype, score_dtype, computing):
    """Weights have the values that one precision leaves of them, in the other one, which the scores are marked with."""
    policy = load_policy(
        ModelOptions(base, adapter_name_or_path=adapter, dtype=dtype, score_dtype=score_dtype)
    )
    weights = {
        n.replace("base_layer.", ""): p for n, p in policy.model.named_parameters() if "lora_" not in n
    }
    assert {p.dtype for p in weights.values()} == {policy.score_dtype} == {getattr(torch, computing)}
    assert policy.description["score_dtype"] == computing
    saved = load_file(Path(base) / "model.safetensors")
    for name, value in saved.items():
        expected = value.to(getattr(torch, dtype)).to(getattr(torch, computing))
        assert torch.equal(weights[f"base_model.model.{name}"], expected)
    notes = " ".join(policy.notes)
    assert ("approximate: what is within" in notes) == (computing == "bfloat16")
    assert ("rounded to bfloat16" in notes) == (dtype == "bfloat16" != computing)


def test_dropout_is_off(adapter):
    """The adapter has dropout 0.5 and the model attention dropout 0.5: two evaluations agree all the same."""
    policy = load_policy(ModelOptions(adapter))
    batch = batch_of(policy)
    assert torch.equal(row_logps(policy.model, batch), row_logps(policy.model, batch))
    assert "Dropout (up to 0.5 in the configuration) is switched off" in policy.notes[-1]


def test_fresh_lora_is_decided_by_its_seed(base):
    """A random by the seed, B = 0; the surrounding random state is untouched."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (
        load_policy(ModelOptions(base, use_peft=True, lora_r=2), seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected)
    assert first.identity == again.identity != other.identity
    assert all(bool(p.any()) == ("lora_A" in n) for n, p in first.parameters.items())
    assert "B of the LoRA is 0" in first.notes[0]
    one = load_policy(ModelOptions(base, use_peft=True, lora_target_modules=("q_proj",)))
    assert all("q_proj" in name for name in one.parameters)


def test_nan_weights_load(base, tmp_path):
    """Broken weights are reported per pair by whoever computes with them; loading and checking go through."""
    folder = Path(tiny.save_policy(tmp_path))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    policy = load_policy(ModelOptions(folder, use_peft=True))
    batch = batch_of(policy)
    check_reference(policy, batch)
    assert row_logps(policy.model, batch).isnan().all()


def test_identity_follows_the_weights(base, adapter, tmp_path):
    """Other weights, another adapter or another tokenizer: another identity; the folder's name is no part."""
    copy = load_policy(ModelOptions(tiny.save_policy(tmp_path / "copy"))).identity
    assert copy == load_policy(ModelOptions(base)).identity
    chatty = tiny.save_policy(tmp_path / "other", tiny.gpt2_tokenizer(chat=True), seed=3)
    other = load_policy(ModelOptions(chatty)).identity
    assert {key for key in copy if copy[key] != other[key]} == {"model", "chat_template"}
    second = tiny.save_adapter(tmp_path / "second", base, seed=9)
    assert (
        load_policy(ModelOptions(adapter)).identity["adapter"]
        != load_policy(ModelOptions(second)).identity["adapter"]
    )
    json.dumps([copy, dict(load_policy(ModelOptions(adapter)).description)])


# --- tokenizers ---------------------------------------------------------------------------------------------


def test_pad_token_falls_back(base):
    """Pad, else end of sequence, else 0; and an id that the model has no embedding for is never used."""
    model = tiny.llama()
    assert pad_id(tiny.llama_tokenizer(), model) == 0
    tokenizer = tiny.gpt2_tokenizer()
    assert pad_id(tokenizer, model) == tokenizer.eos_token_id == 2
    tokenizer.add_special_tokens({"pad_token": "<|late|>"})
    assert pad_id(tokenizer, tiny.llama(vocabulary=tokenizer.pad_token_id)) == 2
    tokenizer.pad_token = tokenizer.eos_token = None
    assert pad_id(tokenizer, model) == 0
    policy = load_policy(ModelOptions(base))
    assert policy.tokenizer.pad_token is None and len(batch_of(policy).input_ids) == 6


def test_the_tokenizer_beside_the_adapter_wins(base, tmp_path):
    """It carries the chat template that the adapter was trained with."""
    folder = tiny.save_adapter(tmp_path, base)
    assert load_policy(ModelOptions(folder)).tokenizer.chat_template is None
    tiny.gpt2_tokenizer(chat=True).save_pretrained(folder)
    assert load_policy(ModelOptions(folder)).tokenizer.chat_template == tiny.CHAT_TEMPLATE


# --- probed parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, count, part",
    [
        ("lora", 8, ".lora_"),
        ("lora_B", 4, ".lora_B"),
        (r"layers\.1\..*lora_A", 2, "layers.1."),
        ("norm", 5, "norm"),
    ],
)
def test_parameters_of_an_adapter(adapter, spec, count, part):
    """By group or by expression; exactly the chosen ones want a gradient."""
    policy = load_policy(ModelOptions(adapter, parameters=spec))
    assert len(policy.parameters) == count and all(part in name for name in policy.parameters)
    assert trainable(policy) == set(policy.parameters)
    policy.reference.logps(
        batch_of(policy)
    )  # PEFT marks every LoRA weight when it switches the adapter on again
    assert trainable(policy) == set(policy.parameters)


def test_full_parameters_leave_the_adapter_out(base, adapter):
    """The base's own parameters, at the adapted function."""
    policy = load_policy(ModelOptions(adapter, parameters="full"))
    assert len(policy.parameters) == len(load_policy(ModelOptions(base)).parameters)
    assert not any("lora_" in name for name in policy.parameters)
    assert policy.description["probed_kind"] == "full"


def test_an_inactive_adapter_is_not_probed(adapter):
    """TRL's frozen copy of the adapter, kept as its reference, carries LoRA weights too."""
    policy = load_policy(ModelOptions(adapter))
    assert isinstance(policy.model, PeftModel)
    policy.model.add_adapter("ref", policy.model.peft_config["default"])
    policy.model.set_adapter("default")
    for spec in (None, "lora", "q_proj"):
        assert not any(".ref." in name for name in choose_parameters(policy.model, spec))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nothing_like_it", "selects none of .* such as"),
        ("lora", "has no adapter"),
        ("(", "regular expression"),
    ],
)
def test_parameters_that_cannot_be(base, spec, message):
    """Nothing selected: some names are shown."""
    with pytest.raises(ModelError, match=message):
        load_policy(ModelOptions(base, parameters=spec))


# --- references ---------------------------------------------------------------------------------------------


def test_adapter_off_is_the_base(base, adapter):
    """The reference of an adapter equals its base alone, bit for bit."""
    policy = load_policy(ModelOptions(adapter))
    batch = batch_of(policy)
    check_reference(policy, batch)
    alone = row_logps(load_policy(ModelOptions(base)).model, batch)
    reference = policy.reference.logps(batch)
    assert reference is not None and torch.equal(reference, alone)
    assert not torch.allclose(row_logps(policy.model, batch), alone)


def test_second_model(base, adapter, tmp_path):
    """A whole model or one with its own adapter; frozen, and without influence on the policy."""
    other = tiny.save_policy(tmp_path / "other", seed=3)
    policy = load_policy(ModelOptions(adapter, ref_model_name_or_path=other))
    batch = batch_of(policy)
    reference = policy.reference.logps(batch)
    assert reference is not None
    assert torch.equal(reference, row_logps(tiny.llama(seed=3), batch))
    same = load_policy(ModelOptions(base, ref_model_name_or_path=adapter))
    expected = row_logps(policy.model, batch)
    torch.testing.assert_close(same.reference.logps(batch), expected)
    assert same.description["reference"] == "model" and same.description["ref_model_name_or_path"] == adapter


def test_the_policy_itself_and_none(base, adapter):
    """Log-ratio 0, and no reference at all."""
    policy = load_policy(ModelOptions(adapter, reference="self"))
    batch = batch_of(policy)
    assert torch.equal(policy.reference.logps(batch), row_logps(policy.model, batch))  # pyright: ignore
    assert load_policy(ModelOptions(adapter, reference="none")).reference.logps(batch) is None


def test_columns(base):
    """Chosen first, then rejected; without being asked for, they are used where the data has them."""
    rows = [
        row | {"ref_chosen_logps": -float(i), "ref_rejected_logps": -10.0} for i, row in enumerate(tiny.ROWS)
    ]
    policy, strict = load_policy(ModelOptions(base)), load_policy(ModelOptions(base, reference="columns"))
    for each in (policy, strict):
        pairs = [tokenize_pair(each.tokenizer, pair) for pair in load_pairs(rows)]
        logps = each.reference.logps(each.collate(pairs), pairs)
        assert logps is not None and logps.tolist() == [0.0, -1.0, -2.0, -10.0, -10.0, -10.0]
    plain = [tokenize_pair(policy.tokenizer, pair) for pair in load_pairs(tiny.ROWS)]
    assert policy.reference.logps(policy.collate(plain), plain) is None
    with pytest.raises(ModelError, match=r"every pair; rows without them: \[0, 1, 2\]"):
        strict.reference.logps(strict.collate(plain), plain)
    mixed = [pairs[0], *plain[1:]]
    with pytest.raises(ModelError, match=r"rows without them: \[1, 2\]"):
        policy.reference.logps(policy.collate(mixed), mixed)
    wrong = [dataclasses.replace(pairs[0], ref_chosen_logps=0.5)]
    with pytest.raises(ModelError, match="none is above 0; got 0.5"):
        policy.reference.logps(policy.collate(wrong), wrong)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reference": "adapter_off"}, "needs an adapter"),
        ({"reference": "model"}, "needs ref_model_name_or_path"),
        ({"reference": "self", "ref_model_name_or_path": "x/y"}, "but the reference is 'self'"),
    ],
)
def test_reference_options_that_contradict(base, options, message):
    """What is missing or too much is named."""
    with pytest.raises(ModelError, match=message):
        load_policy(ModelOptions(base, **options))


# --- the proof of the reference -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("second", [False, True])
def test_a_fresh_lora_starts_at_reward_zero(base, dtype, second):
    """Against its base switched off, and against a second copy of it."""
    policy = load_policy(
        ModelOptions(base, use_peft=True, dtype=dtype, ref_model_name_or_path=base if second else None)
    )
    check_reference(policy, batch_of(policy))
    zero = policy.reference.logps(batch_of(policy))
    torch.testing.assert_close(row_logps(policy.model, batch_of(policy)), zero, rtol=0, atol=0)


def test_a_wrong_reference_of_an_untrained_lora_is_refused(base, tmp_path):
    """Also for an adapter from disk whose B is still 0, as a checkpoint of step 0 has it."""
    other = tiny.save_policy(tmp_path / "other", seed=3)
    zero = tiny.save_adapter(tmp_path / "zero", base, zero=True)
    for policy in (
        load_policy(ModelOptions(base, use_peft=True, ref_model_name_or_path=other)),
        load_policy(ModelOptions(zero, ref_model_name_or_path=other)),
    ):
        with pytest.raises(ModelError, match=r"every B is 0.* differ by up to \d"):
            check_reference(policy, batch_of(policy))


def test_an_adapter_that_changes_its_base_is_refused(base, adapter):
    """Switching it off doesn't bring the base back: the reference would have moved with the training."""
    policy = load_policy(ModelOptions(adapter))
    with torch.no_grad():
        dict(policy.model.named_parameters())["base_model.model.lm_head.weight"].mul_(1.01)
    with pytest.raises(ModelError, match="isn't its base any more"):
        check_reference(policy, batch_of(policy))


def test_an_adapter_that_does_nothing_is_refused(adapter):
    """Trained weights that aren't active: policy and reference would silently be one."""
    policy = load_policy(ModelOptions(adapter))
    assert isinstance(policy.model, PeftModel)
    for module in policy.model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = 0.0
    with pytest.raises(ModelError, match="the adapter isn't active"):
        check_reference(policy, batch_of(policy))


def test_adapter_off_restores_what_wants_a_gradient(adapter):
    """PEFT would leave every LoRA weight trainable."""
    policy = load_policy(ModelOptions(adapter, parameters="layers.0.*lora_A"))
    assert isinstance(policy.model, PeftModel)
    with adapter_off(policy.model):
        pass
    assert trainable(policy) == set(policy.parameters)


# --- errors -------------------------------------------------------------------------------------------------


def refused(message: str, *arguments: Any, **options: Any) -> None:
    """`load_policy` raises ModelError with this message."""
    with pytest.raises(ModelError, match=message):
        load_policy(ModelOptions(*arguments, **options))


def test_names_that_lead_nowhere(base, adapter, tmp_path):
    """Missing, without a model, without an adapter, out of reach, or two at once."""
    (tmp_path / "notes.txt").write_text("x")
    refused("folder with a model or an adapter at ./missing; there is none", "./missing")
    refused("there is none", base, adapter_name_or_path=str(tmp_path / "missing"))
    refused("config.json .a model. .* it holds notes.txt", tmp_path)
    refused("so it isn't an adapter", base, adapter_name_or_path=base)
    refused("'nobody/nothing' from the hub .*offline", "nobody/nothing")
    refused("holds an adapter, and a second one", adapter, adapter_name_or_path=adapter)
    refused("there is an adapter already", adapter, use_peft=True)


def test_an_adapter_whose_base_is_gone(base, tmp_path):
    """Its base can be named instead."""
    folder = tiny.save_adapter(tmp_path, "some/place/else")
    refused("its base is 'some/place/else', and there is no such folder here", folder)
    check_reference(policy := load_policy(ModelOptions(base, adapter_name_or_path=folder)), batch_of(policy))


@pytest.mark.parametrize(
    "shape", [{"hidden": 32}, {"layers": 1}, {"layers": 3}], ids=["shape", "fewer_layers", "more_layers"]
)
def test_an_adapter_made_for_another_base(adapter, shape, tmp_path):
    """PEFT alone would load an adapter for other depths without an error, leaving layers fresh or unused."""
    refused("made for", tiny.save_policy(tmp_path, **shape), adapter_name_or_path=adapter)


def test_adapters_that_cannot_be_used(base, adapter, tmp_path):
    """Other modules, another kind, broken or missing files."""

    def copy(name: str, **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file in Path(adapter).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = (
            changes.pop("config", None) or json.loads((folder / "adapter_config.json").read_text()) | changes
        )
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return str(folder)

    refused("made for", base, adapter_name_or_path=copy("modules", target_modules=["query_key_value"]))
    refused("of the kind IA3", base, adapter_name_or_path=copy("kind", config={"peft_type": "IA3"}))
    broken = Path(copy("broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{nothing")
    refused("doesn't load", base, adapter_name_or_path=str(broken))
    (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    refused("Expected adapter_model.safetensors", base, adapter_name_or_path=str(broken))
    (broken / "adapter_config.json").write_text("{")
    refused("Can't read the adapter", base, adapter_name_or_path=str(broken))


def test_weights_that_are_not_whole(base, tmp_path):
    """Transformers would fill what is missing with random numbers."""
    folder = Path(tiny.save_policy(tmp_path))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("lacks weights of LlamaForCausalLM .*up_proj", folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    refused("Can't load the model", folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused("safetensors weights", folder)


def test_tokenizers_that_do_not_fit(base, tmp_path):
    """Too many tokens, none at all, or another one than the reference's."""
    small = tiny.save_policy(tmp_path / "small", vocabulary=100)
    refused("tokens, but .* has embeddings for 100", small)
    (Path(tiny.save_policy(tmp_path / "none")) / "tokenizer.json").unlink()
    (tmp_path / "none" / "tokenizer_config.json").unlink()
    refused("Can't load a tokenizer", tmp_path / "none")
    other = tiny.save_policy(tmp_path / "other", tiny.llama_tokenizer())
    refused("another tokenizer than the policy", base, ref_model_name_or_path=other)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "gpu"}, "The device 'gpu' can't be used here: RuntimeError: Expected one of cpu, cuda"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"use_peft": True, "lora_target_modules": ["query"]}, "Can't put a LoRA on LlamaForCausalLM"),
    ],
)
def test_options_that_cannot_be(base, options, message):
    """Unknown or contradictory options."""
    refused(message, base, **options)


@pytest.mark.parametrize("device_map", ["auto", "by module"])
def test_spread_model_is_the_same(base, adapter, device_map):
    """On a machine with one device all that a map can do is to leave the numbers alone."""
    plain = load_policy(ModelOptions(base, adapter_name_or_path=adapter, device="cpu"))
    places = device_map if device_map == "auto" else dict.fromkeys(MODULES, "cpu")
    spread = load_policy(ModelOptions(base, adapter_name_or_path=adapter, device_map=places))
    batch = batch_of(plain)
    torch.testing.assert_close(row_logps(spread.model, batch), row_logps(plain.model, batch))


def test_offloaded_weights_are_refused(base, adapter):
    """They are there only while their own layer runs."""
    places = dict.fromkeys(MODULES, "cpu") | {"model.layers.1": "disk"}
    refused(
        "would be offloaded .model.layers.1.*--load_in_4bit",
        base,
        adapter_name_or_path=adapter,
        device_map=places,
    )


MODULES = (
    "model.embed_tokens",
    "model.layers.0",
    "model.layers.1",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_loading_needs_its_package(base, bits, monkeypatch):
    """Said before anything is loaded, with the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(r"pip install bitsandbytes", base, **{bits: True})


# --- the reference that a training saved, or the run stops ---------------------------------------------------


def started(folder: Path, base: str, **names: int) -> str:
    """An adapter with further ones in sub-folders, each with a seed of its own."""
    for name, seed in names.items():
        tiny.save_adapter(folder / name, base, seed=seed)
    return tiny.save_adapter(folder, base)


def test_the_start_that_a_training_saved_is_the_reference(base, tmp_path):
    """TRL's `ref` beside the adapter: the same log-probs as by its name, and said; the base only when asked for."""
    folder = started(tmp_path / "run", base, ref=5)
    policy, named = (
        load_policy(ModelOptions(folder)),
        load_policy(ModelOptions(folder, ref_model_name_or_path=f"{folder}/ref")),
    )
    batch = batch_of(policy)
    assert torch.equal(policy.reference.logps(batch), named.reference.logps(batch))  # pyright: ignore
    assert policy.notes[0].startswith(f"The reference is {folder}/ref")
    assert policy.description["reference"] == "model"
    assert policy.description["ref_model_name_or_path"] == f"{folder}/ref"
    off = load_policy(ModelOptions(folder, reference="adapter_off"))
    alone = row_logps(load_policy(ModelOptions(base)).model, batch)
    assert torch.equal(off.reference.logps(batch), alone)  # pyright: ignore
    assert not torch.allclose(policy.reference.logps(batch), alone)  # pyright: ignore
    assert "though" in off.notes[0] and f"{folder}/ref is there" in off.notes[0]


def test_the_start_is_found_for_a_named_base_too(base, tmp_path):
    """Its own file may name a base that isn't there any more."""
    folder = started(tmp_path / "run", "gone/some/where", ref=5)
    policy = load_policy(ModelOptions(base, adapter_name_or_path=folder))
    assert policy.description["reference"] == "model"
    assert any("names another base, 'gone/some/where'" in note for note in policy.notes)


def test_an_adapter_that_is_named_as_a_reference_stops_the_run(base, tmp_path):
    """Inside or beside; naming either one goes on."""
    inside = started(tmp_path / "a", base, reference=5)
    tiny.save_adapter(tmp_path / "b" / "train", base)
    tiny.save_adapter(tmp_path / "b" / "reference", base, seed=5)
    for folder, start in ((inside, "a/reference"), (str(tmp_path / "b" / "train"), "b/reference")):
        refused(f"{start} is an adapter that is named as the reference.*--reference adapter_off", folder)
        assert load_policy(ModelOptions(folder, reference="adapter_off")).reference.name == "adapter_off"
        assert (
            load_policy(ModelOptions(folder, ref_model_name_or_path=str(tmp_path / start))).reference.name
            == "model"
        )
    assert (
        load_policy(ModelOptions(str(tmp_path / "b" / "reference"))).reference.name == "adapter_off"
    )  # it is the start itself
    refused("holds 2 adapters in sub-folders .reference, train.*b/train as the model", str(tmp_path / "b"))
    refused("and .*b/reference as ref_model_name_or_path", str(tmp_path / "b"))


def test_checkpoints_and_other_adapters_beside_are_no_reference(base, tmp_path):
    """A run's folder keeps its checkpoints, and people keep adapters side by side."""
    folder = started(tmp_path / "run", base, **{"checkpoint-5": 5, "best": 6})
    tiny.save_adapter(tmp_path / "preference", base)
    assert load_policy(ModelOptions(folder)).reference.name == "adapter_off"


def test_an_adapter_that_brings_weights_of_its_base_stops_at_once(base, tmp_path):
    """As after an initialisation that moves the base: known when it is loaded, before any pair."""
    model = get_peft_model(
        tiny.llama(),
        LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(tmp_path))
    refused("isn't its base any more.*ref_model_name_or_path", str(tmp_path))


def test_the_policy_is_its_own_reference_where_nothing_else_is(base, adapter):
    """A model without adapter and without columns: the start of a training, said; columns must then be whole."""
    rows = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in tiny.ROWS]
    plain, carried = load_pairs(tiny.ROWS), load_pairs(rows)
    policy = settle_reference(load_policy(ModelOptions(base)), plain)
    assert policy.reference.name == policy.description["reference"] == "self"
    assert "The reference is the policy itself" in policy.notes[0]
    assert settle_reference(load_policy(ModelOptions(base)), carried).reference.name == "columns"
    mixed = settle_reference(load_policy(ModelOptions(base)), [*plain[:1], *carried])
    with pytest.raises(ModelError, match=r"rows without them: \[0\]"):
        tokens = mixed.tokenize([*plain[:1], *carried]).tokens
        mixed.reference.logps(mixed.collate(tokens), tokens)
    for options in ({"reference": "none"}, {"reference": "columns"}):
        kept = load_policy(ModelOptions(base, **options))
        assert settle_reference(kept, plain) is kept
    kept = load_policy(ModelOptions(adapter))
    assert settle_reference(kept, plain) is kept


# --- what is said of weights ---------------------------------------------------------------------------------


def test_a_lora_on_embeddings_is_a_policy(base):
    """Its A starts at 0 there, so it adds nothing yet."""
    policy = load_policy(ModelOptions(base, use_peft=True, lora_target_modules=("embed_tokens", "q_proj")))
    batch = batch_of(policy)
    check_reference(policy, batch)
    assert policy.pad_id == 2 and policy.vocabulary == 352 and policy.is_its_reference
    with torch.no_grad():
        next(p for n, p in policy.parameters.items() if "lora_embedding_A" in n).fill_(0.1)
    assert not policy.is_its_reference


def test_tensors_that_are_broken_are_named(base, tmp_path):
    """NaN passes through everything, so the place where it comes from is said."""
    folder = Path(tiny.save_policy(tmp_path))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, :2] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    notes = " ".join(load_policy(ModelOptions(str(folder))).notes)
    assert "1 weight tensors hold values that aren't finite" in notes
    assert "model.layers.1.mlp.up_proj.weight (2 values)" in notes
    assert "finite" not in " ".join(load_policy(ModelOptions(base)).notes)


def test_an_adapter_of_another_base_is_called_that(base, adapter, tmp_path):
    """By shape it is refused, by name it is said."""
    wide = tiny.save_policy(tmp_path / "wide", hidden=32)
    refused("is an adapter of another base than this one", wide, adapter_name_or_path=adapter)
    same = tiny.save_policy(tmp_path / "same", seed=9)
    notes = load_policy(ModelOptions(same, adapter_name_or_path=adapter)).notes
    assert any(
        f"names another base, {base!r}, than the one that it is put on, {same!r}" in note for note in notes
    )
    assert not any(
        "another base" in note for note in load_policy(ModelOptions(base, adapter_name_or_path=adapter)).notes
    )


def test_embeddings_that_a_training_resized_are_named(base, tmp_path):
    """Tokens were added before the training: the base has to be resized as it was."""
    model = tiny.llama()
    model.resize_token_embeddings(356)
    tuned = get_peft_model(
        model,
        LoraConfig(
            r=2,
            target_modules=["q_proj"],
            modules_to_save=["embed_tokens", "lm_head"],
            task_type="CAUSAL_LM",
        ),
    )
    tuned.peft_config["default"].base_model_name_or_path = base
    tuned.save_pretrained(str(tmp_path), save_embedding_layers=False)
    refused(
        r"embeddings for 356 tokens, and its base .* for 352.*resize_token_embeddings\(356\)", str(tmp_path)
    )


def test_weights_saved_from_inside_a_wrapper_are_named(base, tmp_path):
    folder = Path(tiny.save_policy(tmp_path))
    weights = {f"_orig_mod.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("Take '_orig_mod.' off the names", str(folder))


# --- names that lead nowhere are answered at once ------------------------------------------------------------


def test_a_misspelt_folder_never_waits_for_the_hub(base, tmp_path, monkeypatch):
    """A folder that is here has it misspelt; what is like it is named."""
    monkeypatch.chdir(tmp_path)
    tiny.save_policy(tmp_path / "models" / "trained")
    monkeypatch.setattr("entangle.models.origin.use_hub", lambda: pytest.fail("asked the hub"))
    refused("there is none .*Is 'models/trained' meant", "models/traned")
    with pytest.raises(DataError, match="there is none .*Is 'models/trained' meant"):
        load_pairs("models/traned")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    """Nobody listens at that address: from then on only what was downloaded is used, without a single retry."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    for name in hub._PROXIES:
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    refused("'nobody/nothing' from the hub", "nobody/nothing")
    assert huggingface_hub.constants.HF_HUB_OFFLINE and time.monotonic() - started < 5


# --- mixtures of experts --------------------------------------------------------------------------------------


def test_experts_are_measured_one_by_one_in_every_precision(tmp_path):
    """LoRA on fused experts (target_parameters), the router's loss on: float64 scores are autograd's; both are said."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=352,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        max_position_embeddings=64,
        eos_token_id=2,
        initializer_range=0.2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny.gpt2_tokenizer().save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"], task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(Qwen3MoeForCausalLM.from_pretrained(tmp_path / "base"), lora)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    policy = load_policy(ModelOptions(str(tmp_path / "adapter"), dtype="float64"))
    assert "output_router_logits is on" in " ".join(policy.notes)
    batch = batch_of(policy, tiny.ROWS[:1])
    check_reference(policy, batch)
    scores = make_engine(policy.model, policy.parameters, "auto").pairs(batch)
    with KeepFloat64():
        logps = token_logps(policy.model, batch).sum(1)
        grads = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(row, list(policy.parameters.values()), retain_graph=True)
                ]
            )
            for row in logps
        ]
    found = torch.tensor([scores.geometry.sq_chosen[0], scores.geometry.inner[0]])
    torch.testing.assert_close(
        found, torch.stack([grads[0] @ grads[0], grads[0] @ grads[1]]), rtol=1e-9, atol=0
    )
    bare = load_policy(
        ModelOptions(
            str(tmp_path / "base"), use_peft=True, lora_target_modules=("q_proj",), lora_r=2, dtype="float32"
        )
    )
    assert "The LoRA isn't on 2 fused tensors of experts" in " ".join(bare.notes)
