"""The probe from options to a finished run folder, on tiny models and real files."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

import entangle
from entangle import embedded
from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.analysis.predictions import predict_losses
from entangle.analysis.summary import summarise
from entangle.analysis.verdict import worst_pairs
from entangle.commands.probe import ProbeResult, run_probe
from entangle.config import ProbeConfig
from entangle.data import tokenize_pair
from entangle.errors import ConfigError, DataError, ModelError, RunError
from entangle.measure.inputs import load_pairs_of, load_policy_of
from entangle.measure.verification import pair_logps
from entangle.models import Policy, load_adam_state
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted
from entangle.scores import AutogradEngine, row_logps, token_logps
from entangle.scores.float64 import KeepFloat64
from losses import build
from tests.probing import options, probe, write_rows
from tests.processes import ENVIRONMENT, run_on_two, torchrun
from tests.tiny import gpt2_tokenizer, save_policy


def test_rows_equal_the_oracle_pair_by_pair(inputs, tmp_path):
    config = options(inputs, tmp_path / "run", dtype="float64")
    rows = probe(config).pairs
    policy = load_policy_of(config)
    oracle = AutogradEngine(policy.model, policy.parameters)
    for pair in load_pairs_of(config):
        batch = policy.collate([tokenize_pair(policy.tokenizer, pair, 64)])
        expected = oracle.pairs(batch)
        row = rows.set_index("index").loc[pair.index]
        scale = float((expected.geometry.sq_chosen * expected.geometry.sq_rejected).sqrt())
        for name in GEOMETRY_COLUMNS:
            assert row[name] == pytest.approx(getattr(expected.geometry, name).item(), abs=1e-9 * scale)
        assert [row["logps_chosen"], row["logps_rejected"]] == pytest.approx(
            expected.logps.tolist(), abs=1e-9
        )
        reference = policy.reference.logps(batch)
        assert [row["ref_logps_chosen"], row["ref_logps_rejected"]] == pytest.approx(
            reference.tolist(), abs=1e-9
        )


def test_run_folder_holds_what_it_promises(inputs, tmp_path):
    result = probe(options(inputs, tmp_path / "run"))
    files = {
        str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").rglob("*") if file.is_file()
    }
    assert files == {
        "config.yaml",
        "identity.json",
        "provenance.json",
        "predictions.parquet",
        "summary.json",
        "texts.parquet",
        "checksums.json",
        "set.json",
        *(f"pairs/{i:05d}.parquet" for i in range(4)),
    }
    assert result.pairs["index"].tolist() == list(range(10))
    assert len(result.predictions) == 30 and set(result.predictions["regime"]) <= {
        "ideal",
        "both_up",
        "both_down",
        "inverted",
        "degenerate",
    }
    provenance = result.run.read_json("provenance.json")
    assert provenance["reference"] == "adapter_off"
    assert provenance["resolution"] == result.summary["resolution"]["believed"]
    assert 1e-6 <= provenance["resolution"] < 1e-4
    assert (
        "Share of pairs per regime" in result.table()
        and "By kind: ideal / both up / both down" in result.table()
    )


def test_summary_is_recomputable_from_the_rows(inputs, tmp_path):
    result = probe(options(inputs, tmp_path / "run"))
    predictions = predict_losses(
        result.pairs,
        [build(name) for name in ("dpo", "simpo", "kto")],
        resolution=result.provenance["resolution"],
        batch_size=8,
    )
    pd.testing.assert_frame_equal(predictions, result.predictions)
    result.run.write_json("again.json", summarise(result.pairs, predictions, "kind"))
    elsewhere = {
        name: result.summary[name] for name in ("set", "resolution")
    }  # test_set_in_probe, test_resolution
    again = result.run.read_json("again.json") | elsewhere
    assert again == result.summary


def test_replay_from_its_own_config_gives_the_same_rows(inputs, tmp_path):
    from entangle.config import parse

    first = probe(options(inputs, tmp_path / "run"))
    config, _ = parse(
        ProbeConfig,
        ["--config", str(tmp_path / "run/config.yaml"), "--output_dir", str(tmp_path / "again")],
        prog="p",
    )
    second = probe(config)
    pd.testing.assert_frame_equal(first.pairs, second.pairs)
    pd.testing.assert_frame_equal(first.predictions, second.predictions)


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"shard_size": 100}, {"engine": "autograd"}])
def test_numbers_depend_neither_on_batches_nor_on_the_engine(inputs, tmp_path, changes):
    """In float64, so that nothing but a mistake can make a difference of 1e-9."""
    first = probe(options(inputs, tmp_path / "a", dtype="float64"))
    second = probe(options(inputs, tmp_path / "b", dtype="float64", **changes))
    scale = np.sqrt(first.pairs["sq_chosen"] * first.pairs["sq_rejected"])
    for name in GEOMETRY_COLUMNS:
        assert (np.abs(first.pairs[name] - second.pairs[name]) <= 1e-9 * scale).all()
    assert first.predictions["regime"].equals(second.predictions["regime"])


def test_finished_run_is_not_computed_again(inputs, tmp_path, monkeypatch):
    config = options(inputs, tmp_path / "run")
    first = probe(config)
    monkeypatch.setattr(
        "entangle.commands.probe.prepared.make_engine", lambda *_: pytest.fail("computed again")
    )
    pd.testing.assert_frame_equal(probe(config).pairs, first.pairs)


def test_folder_of_another_run_is_refused_and_overwritten_on_request(inputs, tmp_path):
    probe(options(inputs, tmp_path / "run"))
    with pytest.raises(RunError, match="holds another run .*max_length: 64 there, 63 now.*--overwrite"):
        probe(options(inputs, tmp_path / "run", max_length=63))
    probe(options(inputs, tmp_path / "run", max_length=63, overwrite=True))
    assert RunFolder(tmp_path / "run").config["max_length"] == 63


def test_changed_data_under_the_same_name_is_another_run(inputs, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 4)
    probe(options(inputs, tmp_path / "run", dataset_name=data))
    write_rows(tmp_path / "rows.jsonl", 4, seed=1)
    with pytest.raises(RunError, match="input data"):
        probe(options(inputs, tmp_path / "run", dataset_name=data))


def test_foreign_folder_is_left_alone(inputs, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match="holds no run of entangle"):
        probe(options(inputs, tmp_path, overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_unscorable_pairs_keep_their_rows_with_a_flag(inputs, tmp_path):
    rows = [
        {"prompt": "TL;DR:", "chosen": " the cat", "rejected": " the cat"},
        {"prompt": "the cat sat " * 40, "chosen": " the cat", "rejected": " they"},
        {"prompt": "TL;DR:", "chosen": " the cat", "rejected": " they " * 80},
        {"prompt": "TL;DR:", "chosen": " the cat", "rejected": " they"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = probe(options(inputs, tmp_path / "run", dataset_name=str(tmp_path / "rows.jsonl")))
    assert result.pairs["identical"].tolist()[0] and result.pairs["dropped"].tolist() == [
        False,
        True,
        False,
        False,
    ]
    assert result.pairs["truncated"].tolist() == [False, False, True, False]
    assert result.summary["pairs"] == {
        "total": 4,
        "scored": 3,
        "truncated": 1,
        "identical": 1,
        "dropped": 1,
        "empty": 0,
        "non_finite": 0,
    }
    regimes = result.predictions.set_index(["loss", "index"])["regime"]
    assert regimes["dpo", 0] == "degenerate" and ("dpo", 1) not in regimes.index
    assert "1 identical, 1 dropped" in result.table()


def test_nan_weights_flag_the_pairs_and_the_run_goes_on(tmp_path):
    base = save_policy(tmp_path / "base", gpt2_tokenizer())
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "base/model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    token = gpt2_tokenizer()(text=" nothing")["input_ids"][-1]
    weights[name][token] = torch.nan
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    rows = [
        {"prompt": "TL;DR:", "chosen": " the cat sat", "rejected": f" {word} there"}
        for word in ("they", "nothing")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = probe(
        ProbeConfig(
            model_name_or_path=base,
            dataset_name=str(tmp_path / "rows.jsonl"),
            reference="self",
            losses=("dpo", "kto"),
            output_dir=str(tmp_path / "run"),
        )
    )
    assert result.pairs["non_finite"].tolist() == [False, True]
    assert result.predictions["index"].tolist() == [0, 0]
    assert np.isfinite(result.predictions["change_chosen"]).all()


def test_losses_that_need_a_reference_are_refused_without_one_if_named(inputs, tmp_path):
    """Before any pair is computed."""
    config = options(inputs, tmp_path / "run", adapter_name_or_path=None, reference="none")
    with pytest.raises(ConfigError, match="dpo needs a reference policy"):
        probe(config)
    assert not (tmp_path / "run").exists()


def test_a_model_without_adapter_is_its_own_reference_and_that_is_said_first(inputs, tmp_path):
    """As TRL starts: every log-ratio is 0, for the losses that compare with a reference too."""
    console = Console(file=io.StringIO(), width=500)
    result = run_probe(options(inputs, tmp_path / "run", adapter_name_or_path=None), console)
    said = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert said.index("The reference is the policy itself") < said.index("pairs ")
    assert result.pairs["ref_logps_chosen"].tolist() == result.pairs["logps_chosen"].tolist()
    provenance = result.run.read_json("provenance.json")
    assert provenance["reference"] == "self"
    assert any("The reference is the policy itself" in note for note in provenance["notes"])


def test_default_losses_leave_out_what_needs_a_reference(inputs, tmp_path):
    from entangle.config import DEFAULT_LOSSES

    result = probe(
        options(inputs, tmp_path / "run", adapter_name_or_path=None, losses=DEFAULT_LOSSES, reference="none")
    )
    assert "dpo" not in result.summary["regimes"] and "simpo" in result.summary["regimes"]


def test_verification_confirms_the_predictions_and_leaves_the_policy_alone(inputs, tmp_path):
    result = probe(options(inputs, tmp_path / "run", verify=5, losses=("dpo", "simpo", "dpop", "cpo")))
    overall = result.summary["verification"]["all"]
    assert overall["steps"] == 20 and overall["sign_agreement"] >= 0.99
    assert overall["slope"] == pytest.approx(1, abs=0.02) and overall["r_squared"] > 0.999
    assert 3.8 < overall["error_ratio"] < 4.2
    assert "Predictions against one real SGD step" in result.table()


@pytest.mark.parametrize("start", [{"reference": "self"}, {"use_peft": True, "lora_r": 2}])
def test_rounding_decides_nothing_where_policy_and_reference_are_one(inputs, tmp_path, start):
    """At log-ratio 0 DPOP's penalty is off: its verdicts are DPO's, and real steps confirm them."""
    given = {"adapter_name_or_path": None, "losses": ("dpo", "dpop"), "verify": 5} | start
    result = probe(options(inputs, tmp_path / "run", **given))
    assert (result.pairs["logps_chosen"] == result.pairs["ref_logps_chosen"]).all()
    by_loss = dict(list(result.predictions.groupby("loss")))
    assert by_loss["dpo"]["regime"].tolist() == by_loss["dpop"]["regime"].tolist()
    verification = result.summary["verification"]["dpop"]
    assert verification["signs_agree"] == verification["signs_compared"] > 0
    assert verification["slope"] == pytest.approx(1, abs=0.02)


def test_interrupt_finishes_the_shard_and_says_how_to_go_on(inputs, tmp_path, monkeypatch):
    write = RunFolder.write_shard

    def press_then_write(self, folder, number, rows):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, folder, number, rows)

    monkeypatch.setattr(RunFolder, "write_shard", press_then_write)
    with pytest.raises(Interrupted, match="2 of 4 shards are in .* entangle probe --config"):
        probe(options(inputs, tmp_path / "run"))
    monkeypatch.undo()
    resumed = probe(options(inputs, tmp_path / "run"))
    pd.testing.assert_frame_equal(resumed.pairs, probe(options(inputs, tmp_path / "unbroken")).pairs)


def test_out_of_memory_halves_the_pass_and_loses_nothing(inputs, tmp_path, monkeypatch):
    import entangle.measure.passes as module

    whole = module.rows_of_pass
    sizes: list[int] = []

    def short_of_memory(batch, measurement):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return whole(batch, measurement)

    monkeypatch.setattr(module, "rows_of_pass", short_of_memory)
    result = probe(options(inputs, tmp_path / "run", modules=True))
    assert result.pairs["index"].tolist() == list(range(10)) and max(sizes) > 1
    assert set(modules_of(result)["index"]) == set(range(10))


def modules_of(result: ProbeResult) -> pd.DataFrame:
    assert result.modules is not None
    return result.modules


def test_modules_sum_to_the_pair_and_equal_a_probe_of_one_alone(inputs, tmp_path):
    """In float64: every pair's block is the sum of its modules', and a module's that of a probe of nothing else."""
    result = probe(options(inputs, tmp_path / "run", modules=True, dtype="float64"))
    rows, pairs = modules_of(result), result.pairs.set_index("index")
    sums = rows.groupby("index")[list(GEOMETRY_COLUMNS)].sum()
    pd.testing.assert_frame_equal(sums, pairs[list(GEOMETRY_COLUMNS)], rtol=1e-9)
    np.testing.assert_allclose(rows.groupby("index")["share"].sum(), 1)
    kinds = {f"{layer}_proj.lora_{factor}" for layer in "qv" for factor in "AB"}
    assert set(rows["kind"]) == kinds and set(rows["layer"]) == {0, 1} and len(rows) == 80
    alone = probe(
        options(inputs, tmp_path / "alone", dtype="float64", parameters=r"layers\.1.*q_proj.lora_A")
    ).pairs
    part = rows[(rows["layer"] == 1) & (rows["kind"] == "q_proj.lora_A")].reset_index(drop=True)
    names = ["index", *GEOMETRY_COLUMNS, "cosine"]
    pd.testing.assert_frame_equal(part[names], alone[names], rtol=1e-8)


def test_module_summary_takes_the_mean_cosine_apart(inputs, tmp_path):
    result = probe(options(inputs, tmp_path / "run", modules=True))
    summary = result.summary["modules"]
    assert list(summary["layers"]) == ["0", "1"] and len(summary["kinds"]) == 4
    for groups in summary.values():
        assert sum(row["cosine_part"] for row in groups.values()) == pytest.approx(
            result.pairs["cosine"].mean()
        )
        assert sum(row["inner_share"] for row in groups.values()) == pytest.approx(1)
        assert sum(row["norm_share"] for row in groups.values()) == pytest.approx(1)
    assert "Where the entanglement lives" in result.table()
    assert not (tmp_path / "run" / "modules").exists()


def test_modules_of_a_broken_run_equal_an_unbroken_ones(inputs, tmp_path, monkeypatch):
    """It dies between a shard's modules and its pairs: that shard is computed again, and nothing is there twice."""
    write = RunFolder.write_shard

    def die(self, folder, number, rows):
        if number == 2 and folder == "pairs":
            raise RuntimeError("killed")
        write(self, folder, number, rows)

    config = options(inputs, tmp_path / "run", modules=True)
    monkeypatch.setattr(RunFolder, "write_shard", die)
    with pytest.raises(RuntimeError, match="killed"):
        probe(config)
    monkeypatch.undo()
    resumed, unbroken = probe(config), probe(options(inputs, tmp_path / "unbroken", modules=True))
    pd.testing.assert_frame_equal(modules_of(resumed), modules_of(unbroken))
    assert resumed.summary == unbroken.summary


def test_predictions_hold_under_the_frozen_metric_of_an_optimizer(inputs, tmp_path):
    """A step -lr P grad L of SimPO, in float64: the measured change is the predicted one to first order."""
    config = options(inputs, tmp_path / "plain", dtype="float64", losses=("simpo",))
    policy, loss = load_policy_of(config), build("simpo")
    save_adamw(policy, tmp_path / "optimizer.pt", updates=3)
    state = {"metric": "adamw", "optimizer_state": str(tmp_path)}
    result = probe(
        options(inputs, tmp_path / "run", dtype="float64", losses=("simpo",), modules=True, **state)
    )
    assert "ADAMW metric" in result.table() and result.run.read_json("provenance.json")["metric"] == "adamw"
    assert "frozen after 3 updates" in " ".join(result.run.read_json("provenance.json")["notes"])
    metric = load_adam_state(tmp_path, policy.model, policy.trained).metric(policy.parameters)
    predicted = result.predictions.set_index("index")[["change_chosen", "change_rejected"]]
    for pair in load_pairs_of(config)[:4]:
        batch = policy.collate([tokenize_pair(policy.tokenizer, pair, 64)])
        value = loss.per_pair(pair_logps(batch, token_logps(policy.model, batch).sum(1), None)).mean()
        gradients = torch.autograd.grad(value, list(policy.parameters.values()))
        expected = predicted.loc[pair.index].to_numpy(float)
        rate = 1e-4 / abs(expected).max()
        moved = []
        for sign in (-1, 2, -1):  # a step down, two up, and back: central differences
            with torch.no_grad():
                for (name, p), g in zip(policy.parameters.items(), gradients, strict=True):
                    p += sign * rate * metric[name] * g
            with KeepFloat64():  # a Llama's norms would go through float32
                moved.append(row_logps(policy.model, batch))
        measured = (moved[0] - moved[1]) / (2 * rate)
        np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-5 * abs(expected).max())


def save_adamw(policy: Policy, file: Path, updates: int, seed: int = 0) -> None:
    """The state of an AdamW that has seen random gradients of the policy's parameters."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=0.0)
    for _ in range(updates):
        for p in policy.parameters.values():
            p.grad = torch.randn(p.shape, generator=draw).to(p) * (1 + torch.arange(p.numel()).view_as(p))
        optimizer.step()
    torch.save(optimizer.state_dict(), file)


def test_another_optimizer_state_is_another_run(inputs, tmp_path):
    policy = load_policy_of(options(inputs, tmp_path / "run"))
    file = tmp_path / "optimizer.pt"
    config = options(inputs, tmp_path / "run", metric="adamw", optimizer_state=str(file))
    save_adamw(policy, file, updates=1)
    probe(config)
    save_adamw(policy, file, updates=1, seed=1)
    with pytest.raises(RunError, match="input optimizer"):
        probe(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metric": "adamw"}, "belong together"),
        ({"optimizer_state": "here"}, "belong together"),
        ({"metric": "adamw", "optimizer_state": "here", "verify": 3}, "real SGD steps"),
    ],
)
def test_metrics_that_cannot_be(inputs, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        options(inputs, tmp_path, **changes)


def test_rows_beyond_learned_positions_are_refused_and_beyond_others_noted(inputs, tmp_path):
    """GPT-2 would fail with an index error; a Llama computes something that it was never made for."""
    shape = GPT2Config(
        vocab_size=352, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    gpt2_tokenizer().save_pretrained(tmp_path / "gpt2")
    changes = {
        "model_name_or_path": str(tmp_path / "gpt2"),
        "adapter_name_or_path": None,
        "losses": ("simpo",),
    }
    with pytest.raises(ModelError, match="GPT2LMHeadModel has positions for 16. Give --max_length 16"):
        probe(options(inputs, tmp_path / "run", **changes))
    assert probe(options(inputs, tmp_path / "run", max_length=16, **changes)).summary["pairs"]["scored"] > 0
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "the cat " * 40, "chosen": " sat", "rejected": " they"}))
    result = probe(options(inputs, tmp_path / "long", dataset_name=str(data), max_length=200))
    assert "made for at most 64 positions" in " ".join(result.run.read_json("provenance.json")["notes"])


def test_rows_that_cannot_be_used_are_left_out_on_request(inputs, tmp_path, caplog):
    rows = [
        {"prompt": "TL;DR:", "chosen": " the cat", "rejected": " they"},
        {"prompt": "", "chosen": "", "rejected": ""},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"dataset_name": str(tmp_path / "rows.jsonl")}
    with pytest.raises(DataError, match="skip_invalid"):
        probe(options(inputs, tmp_path / "run", **changes))
    assert len(probe(options(inputs, tmp_path / "run", skip_invalid=True, **changes)).pairs) == 1
    assert "Left out 1 of the rows" in caplog.text


def test_extra_columns_of_several_kinds_are_text(inputs, tmp_path):
    """In any order, in one shard and over shards; a column of numbers stays one."""
    ids = [1, "b", 2.5, True, "e"]
    rows = [
        {"prompt": "TL;DR:", "chosen": " the cat", "rejected": " they", "id": ids[i], "size": [1, 2.5][i % 2]}
        for i in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"dataset_name": str(tmp_path / "rows.jsonl"), "shard_size": 2, "group_by": "id"}
    pairs = probe(options(inputs, tmp_path / "run", **changes)).pairs
    assert pairs["id"].tolist() == ["1", "b", "2.5", "True", "e"]
    assert pairs["size"].tolist() == [1, 2.5, 1, 2.5, 1]


@pytest.mark.slow
def test_run_killed_at_random_moments_equals_an_unbroken_one(inputs, tmp_path):
    """SIGKILL, three times, at moments drawn between the first shard and the end."""
    data = write_rows(tmp_path / "rows.jsonl", 60, seed=5)
    config = options(inputs, tmp_path / "run", dataset_name=data, shard_size=1, batch_size=1)
    arguments = [
        sys.executable,
        "-m",
        "entangle",
        "probe",
        "--model_name_or_path",
        inputs["base"],
        "--adapter_name_or_path",
        inputs["adapter"],
        "--dataset_name",
        data,
        "--losses",
        "dpo",
        "simpo",
        "kto",
        "--shard_size",
        "1",
        "--batch_size",
        "1",
        "--max_length",
        "64",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads decide the order of sums
    draw = random.Random(7)
    counts = [0]
    for goal in sorted(draw.sample(range(3, 40), 3)):
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        deadline = time.monotonic() + 120
        while len(RunFolder(tmp_path / "run").shards_of("pairs")) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(len(RunFolder(tmp_path / "run").shards_of("pairs")))
        assert not RunFolder(tmp_path / "run").is_complete
    assert counts == sorted(set(counts)), "every process should have added shards"
    resumed = probe(config)
    unbroken = probe(options(inputs, tmp_path / "unbroken", dataset_name=data, shard_size=1, batch_size=1))
    pd.testing.assert_frame_equal(resumed.pairs, unbroken.pairs)
    pd.testing.assert_frame_equal(resumed.predictions, unbroken.predictions)
    assert resumed.summary == unbroken.summary


@pytest.mark.slow
def test_two_processes_share_the_pairs_and_equal_one(inputs, tmp_path):
    """`torchrun` on two gloo processes writes one folder, equal to a single process's."""
    printed = run_on_two(*launch(inputs, inputs["data"], tmp_path / "run", "--shard_size", "3"))
    assert printed.count("Share of pairs per regime") == 1
    both, one = ProbeResult.load(tmp_path / "run"), probe(options(inputs, tmp_path / "one"))
    assert both.pairs["index"].tolist() == one.pairs["index"].tolist()
    for name in (*GEOMETRY_COLUMNS, "logps_chosen", "ref_logps_rejected"):
        np.testing.assert_allclose(both.pairs[name], one.pairs[name], rtol=1e-6, atol=1e-6)
    assert both.summary["regimes"] == one.summary["regimes"]


@pytest.mark.slow
def test_processes_of_which_one_is_killed_leave_a_folder_that_one_process_finishes(inputs, tmp_path):
    """SIGKILL to a rank: `torchrun` stops the other one, and the shards of both go into the resumed run."""
    data = write_rows(tmp_path / "rows.jsonl", 40, seed=6)
    changes = {"dataset_name": data, "shard_size": 1, "batch_size": 1, "modules": True}
    words = launch(inputs, data, tmp_path / "run", "--shard_size", "1", "--batch_size", "1", "--modules")
    launched = subprocess.Popen(
        torchrun(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    run, deadline = RunFolder(tmp_path / "run"), time.monotonic() + 120
    while len(run.shards_of("pairs")) < 6 and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True).stdout.split()
    assert len(ranks) == 2
    os.kill(int(ranks[1]), signal.SIGKILL)
    assert launched.wait(timeout=120) != 0
    assert 6 <= len(run.shards_of("pairs")) < 40 and not run.is_complete
    resumed, unbroken = (probe(options(inputs, tmp_path / name, **changes)) for name in ("run", "unbroken"))
    pd.testing.assert_frame_equal(resumed.pairs, unbroken.pairs)
    pd.testing.assert_frame_equal(modules_of(resumed), modules_of(unbroken))
    assert without_sums(resumed.summary) == without_sums(unbroken.summary)
    modules = (pd.json_normalize(result.summary["modules"]) for result in (resumed, unbroken))
    pd.testing.assert_frame_equal(*modules)  # made of rows of two processes, whose last digits may differ
    sums = [np.array(run.read_json("set.json")["sums"]["products"]) for run in (resumed.run, unbroken.run)]
    np.testing.assert_allclose(
        *sums, rtol=1e-4, atol=1e-4 * np.abs(sums[1]).max()
    )  # added up in another order


def without_sums(summary: dict) -> dict:
    return {name: value for name, value in summary.items() if name not in ("set", "modules")}


def launch(inputs: dict[str, str], data: str, output: Path, *flags: str) -> list[str]:
    """A probe's words on the command line."""
    return [
        "entangle",
        "probe",
        "--model_name_or_path",
        inputs["base"],
        "--adapter_name_or_path",
        inputs["adapter"],
        "--dataset_name",
        data,
        "--losses",
        "dpo",
        "simpo",
        "kto",
        "--max_length",
        "64",
        "--output_dir",
        str(output),
        *flags,
    ]


def test_only_the_main_process_removes_a_run(inputs, tmp_path, monkeypatch):
    config = options(inputs, tmp_path / "run")
    probe(config)
    (tmp_path / "run" / "mark").touch()
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    probe(replace(config, overwrite=True))
    assert (tmp_path / "run" / "mark").exists()


def test_an_adapter_of_ones_own_on_the_embedded_policy_goes_by_its_own_name(tmp_path):
    mine = str(shutil.copytree(embedded.ADAPTER, tmp_path / "mine"))
    for folder, name, adapter in (("a", "embedded", None), ("b", mine, mine)):
        config = ProbeConfig(limit=1, adapter_name_or_path=adapter, output_dir=str(tmp_path / folder))
        provenance = probe(config).run.read_json("provenance.json")
        found = provenance["model_name_or_path"], provenance["adapter_name_or_path"]
        assert found == ("embedded", name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"group_by": "nosuch"}, "Expected a column 'nosuch' .*further columns are: kind"),
        ({"losses": ("dpo", "dpo")}, "Each loss must be given once; got dpo, dpo"),
    ],
)
def test_what_cannot_be_judged_is_said_before_the_model_is_loaded(inputs, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        probe(options(inputs, tmp_path / "run", model_name_or_path=str(tmp_path), **changes))


def test_a_run_folder_that_is_a_file_is_refused_by_that_name(inputs, tmp_path):
    with pytest.raises(RunError, match="it is a file"):
        probe(options(inputs, Path(inputs["data"])))


def test_nothing_to_score_is_no_lack_of_a_reference(inputs, tmp_path):
    result = probe(options(inputs, tmp_path / "run", max_length=2))
    assert result.pairs["dropped"].all() and result.predictions.empty


def test_a_loss_that_weighs_tokens_is_refused_before_anything_is_read(inputs, tmp_path, monkeypatch):
    def read(*arguments):
        raise AssertionError("the data was read")

    monkeypatch.setattr("entangle.commands.probe.run.read_pairs_of", read)
    monkeypatch.setattr("entangle.commands.probe.memory.pairs_of", read)
    with pytest.raises(ConfigError, match="wpo weighs tokens.*Leave it out"):
        probe(options(inputs, tmp_path / "run", losses=("dpo", "wpo")))
    assert not (tmp_path / "run").exists()
    policy = load_policy_of(options(inputs, tmp_path / "run"))
    with pytest.raises(ConfigError, match="wpo weighs tokens"):
        entangle.probe(policy, inputs["data"], ["dpo", "wpo"])


def test_what_has_happened_stands_beside_what_comes_next(inputs, tmp_path):
    """`moved_<side>` is measured: log-prob under the policy less the reference's. The worst pairs' cards say it."""
    result = probe(options(inputs, tmp_path / "run"))
    for side in ("chosen", "rejected"):
        moved = result.pairs[f"logps_{side}"] - result.pairs[f"ref_logps_{side}"]
        assert result.pairs[f"moved_{side}"].tolist() == moved.tolist()
        assert (moved != 0).any()
    worst = worst_pairs(result.pairs, result.predictions, "dpo", 1).iloc[0]
    shown = " ".join(result.table().replace("│", " ").split())
    first, then = f"chosen {worst['moved_chosen']:+.3g} nats", "Next: Under dpo"
    assert first in shown and shown.index(first) < shown.index(then)
    fresh = probe(options(inputs, tmp_path / "fresh", adapter_name_or_path=None, reference="self"))
    assert "nothing has moved since the reference" in " ".join(fresh.table().replace("│", " ").split())
    without = probe(options(inputs, tmp_path / "none", reference="none", losses=("simpo",)))
    assert without.pairs["moved_chosen"].isna().all() and "So far" not in without.table()
