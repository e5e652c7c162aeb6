"""The probe from options to a finished run folder, on tiny models and real files."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from entangle.progress import Interrupted
from rich.console import Console

from entangle.config import ProbeConfig
from entangle.errors import ConfigError, RunError
from entangle.geometry import GEOMETRY_COLUMNS
from entangle.inputs import load_pairs_of, load_policy_of
from entangle.predictions import predict_losses
from entangle.probe import ProbeResult, run_probe
from entangle.runs import RunFolder
from entangle.scores import AutogradEngine
from entangle.summary import summarise
from losses import build
from tests.tiny import gpt2_tokenizer, save_adapter, save_policy

WORDS = "the cat sat on the mat and then the other cat sat there too while they thought of nothing".split()


def write_rows(path: Path, count: int = 10, seed: int = 0) -> str:
    """Pairs of random words, of unlike lengths, in two kinds."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " " + " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = [
        {"prompt": "TL;DR:" + text(2, 6), "chosen": text(1, 4), "rejected": text(1, 4), "kind": "ab"[i % 2]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_policy(folder / "base", gpt2_tokenizer())
    return {
        "base": base,
        "adapter": save_adapter(folder / "adapter", base),
        "data": write_rows(folder / "rows.jsonl"),
    }


def options(inputs: dict[str, str], output: Path, **changes) -> ProbeConfig:
    given = {
        "model_name_or_path": inputs["base"], "adapter_name_or_path": inputs["adapter"],
        "dataset_name": inputs["data"], "losses": ("dpo", "simpo", "kto"), "shard_size": 3, "max_length": 64,
        "output_dir": str(output),
    }  # fmt: skip
    return ProbeConfig(**(given | changes))


def probe(config: ProbeConfig) -> ProbeResult:
    return run_probe(config, Console(quiet=True))


def test_rows_equal_the_oracle_pair_by_pair(inputs, tmp_path):
    config = options(inputs, tmp_path / "run", dtype="float64")
    rows = probe(config).pairs
    policy = load_policy_of(config)
    from entangle.data import tokenize_pair

    oracle = AutogradEngine(policy.model, policy.parameters)
    for pair in load_pairs_of(config):
        batch = policy.collate([tokenize_pair(policy.tokenizer, pair, 64)])
        expected = oracle.pairs(batch)
        row = rows.set_index("index").loc[pair.index]
        scale = float((expected.geometry.chosen_sq * expected.geometry.rejected_sq).sqrt())
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
        "config.yaml", "identity.json", "provenance.json", "predictions.parquet", "summary.json", "texts.parquet",
        *(f"pairs/{i:05d}.parquet" for i in range(4)),
    }  # fmt: skip
    assert result.pairs["index"].tolist() == list(range(10))
    assert len(result.predictions) == 30 and set(result.predictions["regime"]) <= {
        "ideal", "both_up", "both_down", "inverted", "degenerate"
    }  # fmt: skip
    provenance = result.run.read_json("provenance.json")
    assert provenance["resolution"] == 1e-6 and provenance["reference"] == "adapter_off"
    assert (
        "Share of pairs per regime" in result.table()
        and "By kind: ideal / both up / both down" in result.table()
    )


def test_summary_is_recomputable_from_the_rows(inputs, tmp_path):
    result = probe(options(inputs, tmp_path / "run"))
    predictions = predict_losses(
        result.pairs, [build(name) for name in ("dpo", "simpo", "kto")], resolution=1e-6, batch_size=8
    )
    pd.testing.assert_frame_equal(predictions, result.predictions)
    result.run.write_json("again.json", summarise(result.pairs, predictions, "kind"))
    assert result.run.read_json("again.json") == result.summary


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
    scale = np.sqrt(first.pairs["chosen_sq"] * first.pairs["rejected_sq"])
    for name in GEOMETRY_COLUMNS:
        assert (np.abs(first.pairs[name] - second.pairs[name]) <= 1e-9 * scale).all()
    assert first.predictions["regime"].equals(second.predictions["regime"])


def test_finished_run_is_not_computed_again(inputs, tmp_path, monkeypatch):
    config = options(inputs, tmp_path / "run")
    first = probe(config)
    monkeypatch.setattr("entangle.probe.make_engine", lambda *_: pytest.fail("computed again"))
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
        "total": 4, "scored": 3, "truncated": 1, "identical": 1, "dropped": 1, "empty": 0, "non_finite": 0,
    }  # fmt: skip
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
            model_name_or_path=base, dataset_name=str(tmp_path / "rows.jsonl"), reference="self",
            losses=("dpo", "kto"), output_dir=str(tmp_path / "run"),
        )
    )  # fmt: skip
    assert result.pairs["non_finite"].tolist() == [False, True]
    assert result.predictions["index"].tolist() == [0, 0]
    assert np.isfinite(result.predictions["change_chosen"]).all()


def test_losses_that_need_a_reference_are_refused_without_one_if_named(inputs, tmp_path):
    config = options(inputs, tmp_path / "run", adapter_name_or_path=None)
    with pytest.raises(ConfigError, match="dpo needs a reference policy"):
        probe(config)


def test_default_losses_leave_out_what_needs_a_reference(inputs, tmp_path):
    from entangle.config import DEFAULT_LOSSES

    result = probe(options(inputs, tmp_path / "run", adapter_name_or_path=None, losses=DEFAULT_LOSSES))
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

    def press_then_write(self, number, rows):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, number, rows)

    monkeypatch.setattr(RunFolder, "write_shard", press_then_write)
    with pytest.raises(Interrupted, match="2 of 4 shards are in .* entangle probe --config"):
        probe(options(inputs, tmp_path / "run"))
    monkeypatch.undo()
    resumed = probe(options(inputs, tmp_path / "run"))
    pd.testing.assert_frame_equal(resumed.pairs, probe(options(inputs, tmp_path / "unbroken")).pairs)


def test_out_of_memory_halves_the_pass_and_loses_nothing(inputs, tmp_path, monkeypatch):
    import entangle.probe as module

    whole = module._rows_of_pass
    sizes: list[int] = []

    def short_of_memory(batch, policy, engine):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return whole(batch, policy, engine)

    monkeypatch.setattr(module, "_rows_of_pass", short_of_memory)
    rows = probe(options(inputs, tmp_path / "run")).pairs
    assert rows["index"].tolist() == list(range(10)) and max(sizes) > 1


@pytest.mark.slow
def test_run_killed_at_random_moments_equals_an_unbroken_one(inputs, tmp_path):
    """SIGKILL, three times, at moments drawn between the first shard and the end."""
    data = write_rows(tmp_path / "rows.jsonl", 60, seed=5)
    config = options(inputs, tmp_path / "run", dataset_name=data, shard_size=1, batch_size=1)
    arguments = [
        sys.executable, "-m", "entangle", "probe", "--model_name_or_path", inputs["base"],
        "--adapter_name_or_path", inputs["adapter"], "--dataset_name", data, "--losses", "dpo", "simpo", "kto",
        "--shard_size", "1", "--batch_size", "1", "--max_length", "64", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads decide the order of sums
    draw = random.Random(7)
    counts = [0]
    for goal in sorted(draw.sample(range(3, 40), 3)):
        process = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        deadline = time.monotonic() + 120
        while len(RunFolder(tmp_path / "run").shards) < goal and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts.append(len(RunFolder(tmp_path / "run").shards))
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
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
        "-m", "entangle", "probe", "--model_name_or_path", inputs["base"], "--adapter_name_or_path",
        inputs["adapter"], "--dataset_name", inputs["data"], "--losses", "dpo", "simpo", "kto", "--shard_size", "3",
        "--max_length", "64", "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("Share of pairs per regime") == 1
    both, one = ProbeResult.load(tmp_path / "run"), probe(options(inputs, tmp_path / "one"))
    assert both.pairs["index"].tolist() == one.pairs["index"].tolist()
    for name in (*GEOMETRY_COLUMNS, "logps_chosen", "ref_logps_rejected"):
        np.testing.assert_allclose(both.pairs[name], one.pairs[name], rtol=1e-6, atol=1e-6)
    assert both.summary["regimes"] == one.summary["regimes"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
