"""The public API on objects in memory: the numbers of the command, no files, and a model that comes back as it was."""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import entangle as en
from entangle import embedded
from entangle.data import load_pairs, pairs_of
from entangle.errors import ConfigError, DataError, ModelError, RunError
from entangle.runs.folder import RunFolder
from losses import DPO, DPOP, KTO, SimPO
from tests import tiny
from tests.probing import options
from tests.probing import probe as probe_to_folder

ROOT = Path(__file__).resolve().parent.parent
QUIET = Console(quiet=True)
LOSSES = (DPO(), SimPO(), KTO())


def rows_of(inputs: dict[str, str]) -> list[dict]:
    return [json.loads(line) for line in Path(inputs["data"]).read_text().splitlines()]


def in_memory(inputs: dict[str, str]) -> en.Policy:
    """The policy of `inputs` as a user has it: loaded by transformers and PEFT themselves, for inference."""
    base = AutoModelForCausalLM.from_pretrained(inputs["base"])
    model = PeftModel.from_pretrained(base, inputs["adapter"])
    return en.Policy.of(model, AutoTokenizer.from_pretrained(inputs["base"]))


def plain(result: en.ProbeResult) -> dict:
    """What a result says, without the time that it took and the places of its files."""
    changing = {
        "seconds",
        "model_name_or_path",
        "model_revision",
        "adapter_name_or_path",
        "adapter_base",
        "dataset_name",
    }
    provenance = {name: value for name, value in result.provenance.items() if name not in changing}
    return {"summary": result.summary, "set": result.set_content, "provenance": provenance}


def assert_same(found: en.ProbeResult, expected: en.ProbeResult) -> None:
    pd.testing.assert_frame_equal(found.pairs, expected.pairs)
    pd.testing.assert_frame_equal(found.predictions, expected.predictions)
    assert found.texts is not None and expected.texts is not None
    pd.testing.assert_frame_equal(found.texts, expected.texts)
    assert plain(found) == plain(expected)


def test_a_probe_in_memory_says_what_the_run_folder_says(inputs, tmp_path):
    asked = {"modules": True, "diagnostics": ("length_ratio", "ches"), "verify": 2}
    written = probe_to_folder(options(inputs, tmp_path / "run", losses=LOSSES, shard_size=64, **asked))
    policy = en.load_policy(inputs["base"], adapter_name_or_path=inputs["adapter"])
    found = en.probe(policy, inputs["data"], LOSSES, max_length=64, console=QUIET, **asked)
    assert_same(found, written)
    for name in ("modules", "steps"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(written, name))
    assert found.table() == written.table() and found._repr_html_() == written._repr_html_()


def test_a_model_in_memory_gives_the_numbers_of_the_same_model_by_name(inputs, tmp_path):
    written = probe_to_folder(options(inputs, tmp_path / "run", losses=LOSSES, shard_size=64))
    found = en.probe(in_memory(inputs), inputs["data"], LOSSES, max_length=64, console=QUIET)
    assert_same(found, written)


def test_a_model_without_adapter_in_memory_is_its_own_reference(inputs, tmp_path):
    written = probe_to_folder(
        options(inputs, tmp_path / "run", adapter_name_or_path=None, losses=LOSSES, shard_size=64)
    )
    policy = en.Policy.of(tiny.llama(), tiny.gpt2_tokenizer())
    found = en.probe(policy, inputs["data"], LOSSES, max_length=64, console=QUIET)
    assert_same(found, written)
    assert found.provenance["reference"] == "self"


def test_nothing_is_written(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = en.probe(in_memory(inputs), rows_of(inputs), ["dpo"], verify=1, modules=True, console=QUIET)
    found.what_if(["cpo"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_embedded_policy_in_memory_equals_its_run(tmp_path):
    written = probe_to_folder(en.ProbeConfig(output_dir=str(tmp_path / "run")))
    found = en.probe(en.load_policy(), "embedded", console=QUIET)
    assert_same(found, written)
    assert found.provenance["model_name_or_path"] == "embedded"


def test_pairs_may_be_given_in_any_form(inputs):
    policy, rows = in_memory(inputs), rows_of(inputs)
    forms = [Path(inputs["data"]), rows, Dataset.from_list(rows), load_pairs(rows)[::-1]]
    expected = en.probe(policy, inputs["data"], ["dpo"], console=QUIET)
    for given in forms:
        assert_same(en.probe(policy, given, ["dpo"], console=QUIET), expected)


def test_pairs_given_as_pairs_keep_their_own_indices_and_are_refused_if_these_repeat(inputs):
    pairs = load_pairs(rows_of(inputs))
    later = [replace(pair, index=pair.index + 100) for pair in pairs[:4]]
    found = en.probe(in_memory(inputs), later, ["dpo"], console=QUIET)
    assert found.pairs["index"].tolist() == [100, 101, 102, 103]
    with pytest.raises(DataError, match="indices differ; 3 comes more than once"):
        pairs_of([*pairs, pairs[3]])
    with pytest.raises(DataError, match="at least one pair"):
        pairs_of([])


def test_extra_columns_of_several_kinds_become_text(inputs):
    rows = [row | {"note": note} for row, note in zip(rows_of(inputs)[:2], (1, "two"), strict=True)]
    assert [pair.extra["note"] for pair in load_pairs(load_pairs(rows))] == ["1", "two"]
    assert len(load_pairs("embedded")) == len(embedded.PAIRS.read_text().splitlines())


def test_the_set_can_be_read_by_loss(inputs):
    found = en.probe(in_memory(inputs), inputs["data"], LOSSES, console=QUIET)
    whole = found.set
    assert list(whole.drift) == list(whole.regimes) == [loss.label for loss in LOSSES]
    assert whole.pairs == 10 and whole.prompts == 10
    incentives = found.predictions.query("loss == 'dpo'")[["incentive_chosen", "incentive_rejected"]].mean()
    move = whole.geometry.move(*map(float, incentives))
    for name in ("chosen", "rejected", "margin", "drift"):
        expected, read = getattr(move, name), getattr(whole.moves["dpo"], name)
        np.testing.assert_equal(
            [read.value, read.low, read.high], [expected.value, expected.low, expected.high]
        )
    assert whole.regimes["dpo"] is move.regime
    read = [whole.drift["dpo"], whole.cosine, whole.norm_ratio, *whole.band]
    expected = [move.drift, whole.geometry.cosine, whole.geometry.norm_ratio, *whole.geometry.band]
    np.testing.assert_equal([estimate.value for estimate in read], [estimate.value for estimate in expected])
    assert "dpo" in whole._repr_html_()


def test_a_set_that_cannot_be_had_is_said_in_words(inputs):
    found = en.probe(in_memory(inputs), rows_of(inputs)[:1], ["dpo"], console=QUIET)
    assert "set" not in found.summary and found.set_content is None
    with pytest.raises(RunError, match="two different prompts"):
        _ = found.set


def test_what_if_of_a_probe_equals_that_of_its_folder(inputs, tmp_path):
    written = probe_to_folder(options(inputs, tmp_path / "run", shard_size=64))
    found = en.probe(in_memory(inputs), inputs["data"], ["dpo", "simpo", "kto"], max_length=64, console=QUIET)
    asked = {"losses": [DPOP(penalty=5), "cpo"], "target": 0.8}
    judged = found.what_if(**asked)
    for other in (
        en.what_if(found, **asked),
        written.what_if(**asked),
        en.what_if(tmp_path / "run", **asked),
    ):
        pd.testing.assert_frame_equal(judged.settings, other.settings)
        assert judged.recommendation == other.recommendation and judged.recommendation
        np.testing.assert_equal(
            {k: v for k, v in judged.summary.items() if k != "provenance"},
            {k: v for k, v in other.summary.items() if k != "provenance"},
        )


def test_a_probe_in_memory_has_no_folder_and_a_written_one_has(inputs, tmp_path):
    found = en.probe(in_memory(inputs), rows_of(inputs), ["dpo"], console=QUIET)
    assert found.run is None
    with pytest.raises(RunError, match="made in memory.*run_probe"):
        _ = found.folder
    written = probe_to_folder(options(inputs, tmp_path / "run"))
    assert isinstance(written.folder, RunFolder) and written.folder.path == tmp_path / "run"


# --- a model that belongs to somebody else ------------------------------------------------------------------


def lora(seed: int = 3) -> PeftModel:
    """A LoRA in the middle of a training: B isn't 0, one matrix is frozen, dropout is on."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny.llama(), config)
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    return model.train()


def state_of(model: torch.nn.Module) -> tuple:
    parameters = {
        name: (p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
        for name, p in model.named_parameters()
    }
    return parameters, [m.training for m in model.modules()], torch.random.get_rng_state()


def assert_unchanged(model: torch.nn.Module, before: tuple) -> None:
    parameters, modes, random = state_of(model)
    for name, (value, wanted, grad) in before[0].items():
        assert torch.equal(parameters[name][0], value) and parameters[name][1] == wanted, name
        assert (grad is None) == (parameters[name][2] is None), name
        assert grad is None or torch.equal(parameters[name][2], grad), name
    assert modes == before[1] and torch.equal(random, before[2])


@pytest.mark.parametrize("make", [lora, lambda: tiny.llama().train()], ids=["lora", "full"])
@pytest.mark.parametrize("parameters", [None, "full", "q_proj"])
def test_a_model_in_training_comes_back_as_it_was(inputs, make, parameters):
    model = make()
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    before = state_of(model)
    policy = en.Policy.of(model, tiny.gpt2_tokenizer(), parameters=parameters)
    assert_unchanged(model, before)
    en.probe(policy, inputs["data"], ["dpo"], verify=1, console=QUIET)
    assert_unchanged(model, before)
    with pytest.raises(DataError):
        en.probe(policy, [{"prompt": "a", "chosen": 1, "rejected": "b"}], ["dpo"], console=QUIET)
    with pytest.raises(ModelError):  # refused within the measurement: the pairs have no such columns
        refused = en.Policy.of(model, tiny.gpt2_tokenizer(), reference="columns", parameters=parameters)
        en.probe(refused, inputs["data"], ["dpo"], console=QUIET)
    assert_unchanged(model, before)


def test_whatever_is_drawn_or_raised_within_ready_leaves_the_model_as_it_was():
    model = lora()
    before = state_of(model)
    policy = en.Policy.of(model, tiny.gpt2_tokenizer(), parameters="lora_A")
    with pytest.raises(KeyError), policy.ready() as ready:
        assert not model.training and ready is policy
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(policy.parameters)
        torch.rand(1)
        raise KeyError
    assert_unchanged(model, before)


def test_dropout_has_no_part_in_the_numbers(inputs):
    model, asked = lora(), {"losses": ["dpo"], "verify": 3, "console": QUIET}
    policy = en.Policy.of(model, tiny.gpt2_tokenizer())
    training = en.probe(policy, inputs["data"], **asked)
    model.eval()
    resting = en.probe(policy, inputs["data"], **asked)
    assert_same(training, resting)
    assert training.steps is not None and resting.steps is not None
    pd.testing.assert_frame_equal(training.steps, resting.steps)
    assert training.summary["verification"]["dpo"]["error_ratio"] == pytest.approx(4, abs=0.2)


def test_a_training_goes_on_bit_for_bit(inputs):
    def train(probed: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        model = lora()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        policy = en.Policy.of(model, tiny.gpt2_tokenizer())
        for _ in range(3):
            ids = torch.randint(0, 300, (2, 12))
            model(input_ids=ids, labels=ids).loss.backward()
            if probed:
                en.probe(policy, inputs["data"], ["dpo"], console=QUIET)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    assert all(map(torch.equal, train(True), train(False)))


def test_what_wants_a_gradient_is_probed_unless_named(inputs):
    model = lora()
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(en.Policy.of(model, tiny.gpt2_tokenizer()).parameters) == wanted
    assert in_memory(inputs).description["probed_kind"] == "lora"  # loaded for inference: none wants one
    bare = tiny.llama()
    bare.get_input_embeddings().requires_grad_(False)
    policy = en.Policy.of(bare, tiny.gpt2_tokenizer())
    assert len(policy.parameters) == len(list(bare.parameters())) - 1
    assert len(en.Policy.of(bare.requires_grad_(False), tiny.gpt2_tokenizer()).parameters) == len(
        list(bare.parameters())
    )


def test_the_optimiser_in_memory_is_the_metric(inputs, tmp_path):
    model = in_memory(inputs).model
    model.set_adapter("default")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    policy = en.Policy.of(model, tiny.gpt2_tokenizer())
    found = en.probe(policy, inputs["data"], ["dpo"], optimizer=optimizer, console=QUIET)
    assert_same(found, en.probe(policy, inputs["data"], ["dpo"], optimizer=tmp_path, console=QUIET))
    assert found.provenance["metric"] == found.set.content["metric"] == "adamw"
    plain_metric = en.probe(policy, inputs["data"], ["dpo"], console=QUIET)
    assert (found.pairs["sq_chosen"] > 10 * plain_metric.pairs["sq_chosen"]).all()
    with pytest.raises(ConfigError, match="Drop one"):
        en.probe(policy, inputs["data"], ["dpo"], optimizer=optimizer, verify=1, console=QUIET)


def test_references_of_a_model_in_memory(inputs):
    def reference_logps(model, reference: Any = "auto") -> np.ndarray:
        policy = en.Policy.of(model, tiny.gpt2_tokenizer(), reference=reference)
        found = en.probe(policy, inputs["data"], ["simpo"], console=QUIET)
        return found.pairs[["ref_logps_chosen", "ref_logps_rejected"]].to_numpy()

    def policy_logps(model) -> np.ndarray:
        found = en.probe(en.Policy.of(model, tiny.gpt2_tokenizer()), inputs["data"], ["simpo"], console=QUIET)
        return found.pairs[["logps_chosen", "logps_rejected"]].to_numpy()

    adapted, base, other = lora(), tiny.llama(), tiny.llama(seed=9)
    np.testing.assert_allclose(reference_logps(adapted), policy_logps(base), rtol=1e-5)
    np.testing.assert_allclose(reference_logps(adapted, other), policy_logps(other), rtol=1e-6)
    np.testing.assert_allclose(reference_logps(adapted, "self"), policy_logps(adapted), rtol=1e-6)
    assert np.isnan(reference_logps(adapted, "none")).all()
    beside = lora()
    beside.add_adapter("ref", copy.deepcopy(beside.peft_config["default"]))
    with torch.no_grad():
        for name, parameter in beside.named_parameters():
            if "lora_B.ref" in name:
                parameter.normal_()
    before = state_of(beside)
    start = reference_logps(beside)
    assert_unchanged(beside, before)
    beside.set_adapter("ref")
    np.testing.assert_allclose(start, policy_logps(beside), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.nn.Linear(2, 2), "Expected as model a PreTrainedModel or a PeftModel; got Linear.*unwrap"),
        ("run/checkpoint-200", "got str"),
    ],
)
def test_what_is_no_model_is_refused(given, message):
    with pytest.raises(ModelError, match=message):
        en.Policy.of(given, tiny.gpt2_tokenizer())


def test_an_adapter_that_moved_its_base_has_no_reference_of_its_own():
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    model = get_peft_model(tiny.llama(), config)
    with pytest.raises(ModelError, match="initialised by pissa.*reference=MODEL"):
        en.Policy.of(model, tiny.gpt2_tokenizer())
    assert en.Policy.of(model, tiny.gpt2_tokenizer(), reference=tiny.llama()).reference.name == "model"


def test_what_cannot_be_probed_is_said_before_anything_is_measured(inputs):
    policy = in_memory(inputs)
    with pytest.raises(ModelError, match="Expected a Policy; got LlamaForCausalLM.*Policy.of"):
        en.probe(tiny.llama(), inputs["data"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="At least one loss"):
        en.probe(policy, inputs["data"], [], console=QUIET)
    with pytest.raises(ConfigError, match="once"):
        en.probe(policy, inputs["data"], ["dpo", DPO()], console=QUIET)
    with pytest.raises(ConfigError, match="Expected a column 'topic'.*kind"):
        en.probe(policy, inputs["data"], ["dpo"], group_by="topic", console=QUIET)
    without = en.Policy.of(policy.model, policy.tokenizer, reference="none")
    with pytest.raises(ConfigError, match="dpo needs a reference"):
        en.probe(without, inputs["data"], ["dpo"], console=QUIET)
    assert "dpo" not in en.probe(without, inputs["data"], console=QUIET).summary["regimes"]


# --- loading by name ----------------------------------------------------------------------------------------


def test_a_policy_is_loaded_by_name_or_by_options(inputs):
    by_name = en.load_policy(inputs["base"], adapter_name_or_path=inputs["adapter"], parameters="lora_B")
    given = en.ModelOptions(inputs["base"], adapter_name_or_path=inputs["adapter"])
    by_options = en.load_policy(given, parameters="lora_B")
    assert list(by_name.parameters) == list(by_options.parameters)
    assert by_name.identity == by_options.identity
    assert en.load_policy(Path(inputs["adapter"])).identity == by_name.identity
    with pytest.raises(ConfigError, match="no option 'paramters'. Known: model_name_or_path.*parameters"):
        en.load_policy(inputs["base"], paramters="lora")


# --- the names ----------------------------------------------------------------------------------------------


def test_every_public_name_can_be_had_and_is_the_same_for_type_checkers():
    tree = ast.parse((ROOT / "entangle" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == en.PUBLIC
    assert set(en.__all__) == {"__version__", *en.PUBLIC} and set(en.PUBLIC) <= set(dir(en))
    for name in en.PUBLIC:
        assert getattr(en, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prob'"):
        _ = en.prob


def test_importing_the_package_is_light():
    program = "import sys, entangle; sys.exit(bool({'torch', 'pandas', 'rich', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


@pytest.mark.parametrize("name", en.PUBLIC)
def test_every_public_name_is_in_the_reference(name):
    """A page of the API names the object itself, so its whole docstring is there."""
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    assert re.search(rf"^::: entangle\.{name}$", pages, re.MULTILINE), name
    assert getattr(en, name).__doc__
