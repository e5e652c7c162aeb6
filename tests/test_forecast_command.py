"""`entangle forecast`: its Gram matrix against autograd's, its curves against real steps, and as a command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from entangle.analysis.forecast import draw_batches
from entangle.analysis.geometry import SIDES
from entangle.cli import main
from entangle.commands.forecast.curves import held_out
from entangle.commands.forecast.run import run_forecast
from entangle.commands.probe import ProbeResult, run_probe
from entangle.config import ForecastConfig, ProbeConfig
from entangle.data import TokenizedPair, load_pairs, tokenize_pair
from entangle.errors import ConfigError, ModelError, RunError
from entangle.measure.gram import PairGram
from entangle.measure.inputs import load_policy_of
from entangle.scores import make_engine, row_logps, score_gram
from entangle.scores.float64 import KeepFloat64
from losses import DPO, PairLogps
from tests.tiny import gpt2_tokenizer, save_adapter, save_policy

WORDS = ("the cat", "the mat", "they", "four", "the sum", "the other cat sat", "five", "she said")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ProbeConfig:
    """A finished probe of eight pairs, two of them of one prompt, and one that can't be scored."""
    folder = tmp_path_factory.mktemp("forecast")
    base = save_policy(folder / "base", gpt2_tokenizer())
    rows = [
        {
            "prompt": f"TL;DR: {WORDS[k // 2 * 2]}",
            "chosen": f" {WORDS[k]} sat",
            "rejected": f" {WORDS[k - 3]}",
        }
        for k in range(8)
    ]
    rows.insert(3, {"prompt": "the cat sat " * 40, "chosen": " the cat", "rejected": " they"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ProbeConfig(
        model_name_or_path=base,
        adapter_name_or_path=save_adapter(folder / "adapter", base),
        dtype="float64",
        dataset_name=str(folder / "rows.jsonl"),
        losses=("dpo", "ipo"),
        max_length=64,
        output_dir=str(folder / "run"),
    )
    run_probe(config, Console(quiet=True))
    return config


def forecast_of(config: ProbeConfig, **asked):
    asked = {"per_device_train_batch_size": 2, "max_steps": 6, "plots": False} | asked
    return run_forecast(ForecastConfig(run=str(config.output_dir), **asked), Console(quiet=True))


def scored_batch(options: ProbeConfig):
    """The policy and its scored pairs as one batch of rows."""
    policy = load_policy_of(options)
    pairs = [tokenize_pair(policy.tokenizer, p, options.max_length) for p in load_pairs(options.dataset_name)]
    return policy, [pair for number, pair in enumerate(pairs) if number != 3]


def logps_of(model: torch.nn.Module, pairs: list[TokenizedPair], side: str) -> torch.Tensor:
    """Log pi of each pair's response, one by one, for autograd."""
    logps = []
    for pair in pairs:
        response = getattr(pair, f"{side}_ids")
        ids = torch.tensor([*pair.prompt_ids, *response])[None]
        tokens = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        logps.append(tokens[-len(response) :].sum())
    return torch.stack(logps)


def test_the_gram_matrix_is_that_of_all_scores(options):
    forecast_of(options)
    policy, pairs = scored_batch(options)
    engine = make_engine(policy.model, policy.parameters, "autograd")
    kept = PairGram.load(ProbeResult.load(options.output_dir).folder)
    assert kept is not None
    torch.testing.assert_close(
        kept.products, score_gram(engine, [policy.collate(pairs)]), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_short_real_training_goes_where_it_says(options, momentum):
    """The same batches, trained by torch's SGD: at small steps both means move as forecast, held-out ones too."""
    rate, steps = 1e-4, 6
    found = forecast_of(options, learning_rate=rate, momentum=momentum, seeds=(5,))
    policy, pairs = scored_batch(options)
    rows = ProbeResult.load(options.output_dir).scored(None, 1)
    is_held = held_out(rows, 0.25)
    assert is_held.sum() == 2
    batches = draw_batches(torch.from_numpy(np.flatnonzero(~is_held)), 2, steps, seed=5)
    parameters = list(policy.parameters.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser, whole, n = (
        torch.optim.SGD(parameters, rate, momentum=momentum),
        policy.collate(pairs),
        len(pairs),
    )
    reference = torch.tensor(rows[["ref_logps_chosen", "ref_logps_rejected"]].to_numpy()).T
    with KeepFloat64():
        before = row_logps(policy.model, whole).detach().view(2, n)
        for batch in batches:
            now = torch.stack([logps_of(policy.model, [pairs[i] for i in batch], side) for side in SIDES])
            lengths = [
                torch.tensor(rows[f"length_{side}"].to_numpy())[batch] for side in ("chosen", "rejected")
            ]
            optimiser.zero_grad()
            DPO().per_pair(
                PairLogps(now[0], now[1], lengths[0], lengths[1], reference[0, batch], reference[1, batch])
            ).mean().backward()
            optimiser.step()
        moved = row_logps(policy.model, whole).detach().view(2, n) - before
    last = found.curves[found.curves["step"] == steps].set_index("split")
    for split, is_in in (("trained", ~is_held), ("held_out", is_held)):
        for side, change in zip(SIDES, moved, strict=True):
            measured = change[torch.from_numpy(is_in)].mean().item()
            assert last.loc[split, side] == pytest.approx(measured, rel=5e-3, abs=1e-9)


def test_by_default_a_loss_gains_one_nat_of_margin_at_its_first_speed(options):
    """At a thousandth of that rate the log-probs hardly bend, and the trained margin grows by a thousandth."""
    rate = forecast_of(options, losses=("ipo",), max_steps=3).summary["losses"]["ipo"]["learning_rate"]
    slow = forecast_of(
        options, losses=("ipo",), max_steps=3, learning_rate=rate / 1000, per_device_train_batch_size=6
    )
    assert slow.summary["losses"]["ipo"]["trained"]["margin"]["mean"] == pytest.approx(1e-3, rel=0.02)


def test_a_second_call_needs_no_model(options, tmp_path):
    first = forecast_of(options)
    run = shutil.copytree(options.output_dir, tmp_path / "run")
    moved = replace(options, output_dir=str(run))
    config = (run / "config.yaml").read_text().replace(str(options.model_name_or_path), "/nowhere")
    (run / "config.yaml").write_text(config)
    pd.testing.assert_frame_equal(forecast_of(moved).curves, first.curves)
    by_object = ProbeResult.load(run).forecast(["dpo"], batch_size=2, steps=6)
    pd.testing.assert_frame_equal(by_object.curves, first.curves)
    with pytest.raises(ModelError, match="nowhere"):
        forecast_of(moved, limit=6)  # other pairs: measured again, and the model isn't there


def test_other_pairs_are_measured_again(options):
    assert forecast_of(options, limit=6, eval_share=0.0).summary["pairs"] == 6
    assert forecast_of(options).summary["pairs"] == 8
    assert not (Path(str(options.output_dir)) / "gram").exists()


def test_no_prompt_is_on_both_sides():
    rows = pd.DataFrame({"prompt_hash": list("abbccc")})
    assert held_out(rows, 0.5).tolist() == [True, True, True, False, False, False]
    assert held_out(rows, 0.3).tolist() == [True, False, False, False, False, False]
    assert not held_out(rows, 0.0).any()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"per_device_train_batch_size": 64}, "fewer than a batch of 64"),
        ({"learning_rate": 1e9, "losses": ("ipo",), "max_steps": 200}, "grow without bound"),
        ({"losses": ("tdpo1",)}, "tdpo1"),
    ],
)
def test_what_cannot_be_forecast_says_why(options, asked, words):
    with pytest.raises((RunError, ConfigError), match=words):
        forecast_of(options, **asked)


@pytest.mark.parametrize(
    "asked",
    [{"learning_rate": 0.0}, {"momentum": 1.0}, {"eval_share": 1.0}, {"seeds": ()}, {"seeds": (1, 1)}],
)
def test_options_out_of_range(asked):
    with pytest.raises(ConfigError):
        ForecastConfig(run="x", **asked)


def test_as_a_command(options, capsys):
    run = str(options.output_dir)
    assert main(["forecast", run, "--losses", "dpo", "ipo", "--per_device_train_batch_size", "2"]) == 0
    said = capsys.readouterr().out
    assert "held-out pairs, mean change in nats" in said and "gradients held" in said
    assert (Path(run) / "forecast.png").stat().st_size > 1000
    assert main(["forecast", str(Path(run).parent / "nothing")]) == 2


def test_nothing_is_pickled(options):
    forecast_of(options)
    table = pd.read_parquet(Path(str(options.output_dir)) / "gram.parquet")
    assert table.columns.tolist() == ["index", "products_chosen", "products_rejected"]


def test_the_first_step_of_the_set_is_exact_for_each_pair_s_own_incentives(options):
    """Means over pairs of different prompts, straight from the Gram matrix and the probe's predictions."""
    found = forecast_of(options, losses=("ipo",)).summary["losses"]["ipo"]["first_step"]
    probe = ProbeResult.load(options.output_dir)
    gram = PairGram.load(probe.folder)
    assert gram is not None
    rows = probe.scored(None, 1)
    own = probe.predictions.query("loss == 'ipo'").set_index("index").loc[rows["index"]]
    apart = rows["prompt_hash"].to_numpy()[:, None] != rows["prompt_hash"].to_numpy()
    blocks = gram.products.numpy().reshape(2, len(rows), 2, len(rows))
    for side, block in zip(SIDES, blocks, strict=True):
        moved = (
            block[:, 0] * own["incentive_chosen"].to_numpy()
            - block[:, 1] * own["incentive_rejected"].to_numpy()
        )
        assert found[side]["value"] == pytest.approx(moved[apart].mean(), rel=1e-9)
