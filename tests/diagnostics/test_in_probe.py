"""Diagnostics as columns of a probe's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from entangle.commands.probe import run_probe
from entangle.config import ProbeConfig
from entangle.data import tokenize_pair
from entangle.diagnostics import columns_of, compute
from entangle.errors import ConfigError
from entangle.measure.inputs import load_pairs_of, load_policy_of
from tests.probing import options, probe, write_rows


def test_columns_of_every_pair_equal_the_diagnostics_of_the_pair_alone(inputs, tmp_path):
    data = Path(write_rows(tmp_path / "rows.jsonl", count=8))
    rows = [
        json.loads(line) | {"ches": f"their own {i}"} for i, line in enumerate(data.read_text().splitlines())
    ]
    rows[3]["prompt"] = "TL;DR:" + " the cat" * 60  # too long: dropped, so it has no numbers
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = options(inputs, tmp_path / "run", dataset_name=str(data), diagnostics=("all",), dtype="float64")
    done = probe(config)
    found = done.pairs.set_index("index")
    policy = load_policy_of(config)
    for pair in load_pairs_of(config):
        assert found.loc[pair.index, "data_ches"] == f"their own {pair.index}"
        tokenized = tokenize_pair(policy.tokenizer, pair, config.max_length)
        if tokenized.dropped:
            assert found.loc[pair.index, list(columns_of(["all"]))].isna().all()
            continue
        expected = compute(["all"], policy, policy.collate([tokenized]), [tokenized])
        for column, values in expected.items():
            assert found.loc[pair.index, column] == pytest.approx(values.item(), rel=1e-5, abs=1e-9), column
    assert done.summary["diagnostics"]["columns"] == list(columns_of(["all"]))
    couples = {(row["first"], row["second"]): row for row in done.summary["diagnostics"]["correlations"]}
    assert couples["ches", "cosine"]["pairs"] == 7 and ("ches", "change_chosen") in couples
    expected = found[["edit_distance", "cosine"]].dropna().corr("spearman").iloc[0, 1]
    assert couples["edit_distance", "cosine"]["rho"] == pytest.approx(expected)
    assert "Rank correlation of diagnostics" in done.table() and "squeezing_rejected" in done.table()


def test_without_the_option_nothing_is_added(inputs, tmp_path):
    done = probe(options(inputs, tmp_path / "run"))
    assert not {*columns_of(["all"])} & {*done.pairs} and "diagnostics" not in done.summary


def test_unknown_name_is_refused_before_the_model_is_loaded(tmp_path):
    config = ProbeConfig(
        model_name_or_path="nowhere/at-all", diagnostics=("chess",), output_dir=str(tmp_path / "r")
    )
    with pytest.raises(ConfigError, match="Unknown diagnostic 'chess'"):
        run_probe(config, Console(quiet=True))
