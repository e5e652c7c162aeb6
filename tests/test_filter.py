"""Filtering a data set by a finished probe: rules, formats, provenance, and refusals. The probe is real."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from rich.console import Console

from entangle import embedded
from entangle.cli import main
from entangle.commands.filter import (
    FilterResult,
    StoredData,
    data_options_of,
    decide,
    matches,
    pair_table,
    run_filter,
)
from entangle.commands.probe import ProbeResult, run_probe
from entangle.config import FilterConfig, ProbeConfig, parse_rule, parse_weight
from entangle.data import load_pairs
from entangle.errors import ConfigError, RunError
from tests.probing import write_rows
from tests.tiny import gpt2_tokenizer, save_policy


def formats_of(folder: Path) -> dict[str, Path]:
    """The same twelve rows in every format, with a repeated pair, an id as text and a nested column."""
    lines = Path(write_rows(folder / "plain.jsonl", count=11)).read_text().splitlines()
    rows = [json.loads(line) for line in [*lines, lines[2]]]
    rows = [row | {"id": f"00{i}", "score": i / 3} for i, row in enumerate(rows)]
    files = {suffix: folder / f"rows.{suffix}" for suffix in ("jsonl", "json", "csv", "parquet")}
    files["jsonl"].write_text("".join(json.dumps(row | {"meta": {"a": [1]}}) + "\n" for row in rows))
    files["json"].write_text(json.dumps(rows))
    pd.DataFrame(rows).to_csv(files["csv"], index=False)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"origin": "here"})
    parquet.write_table(table, files["parquet"])
    return files


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy") / "base", gpt2_tokenizer())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return formats_of(tmp_path_factory.mktemp("data"))


def probe_of(policy: str, data: Path, folder: Path, **options) -> str:
    given = {
        "model_name_or_path": policy,
        "dataset_name": str(data),
        "losses": ("dpo", "simpo"),
        "max_length": 40,
        "diagnostics": ("ches", "edit_distance"),
        "reference": "self",
        "output_dir": str(folder),
    }
    run_probe(ProbeConfig(**(given | options)), Console(quiet=True))
    return str(folder)


@pytest.fixture(scope="module")
def run(policy, files, tmp_path_factory: pytest.TempPathFactory) -> str:
    return probe_of(policy, files["jsonl"], tmp_path_factory.mktemp("runs") / "run")


def filtered(run: str, out: Path, **options) -> FilterResult:
    return run_filter(FilterConfig(run=run, out=str(out), **options))


def test_rules_are_parsed_as_the_grammar_says():
    rule = parse_rule(" cosine >= -0.5 and ches highest 10% and truncated and kind==a ")
    assert [(c.column, c.operator, c.value) for c in rule.conditions] == [
        ("cosine", ">=", -0.5),
        ("ches", "highest", 10.0),
        ("truncated", "is", True),
        ("kind", "==", "a"),
    ]
    assert parse_rule("kind=a").conditions == parse_rule("kind == a").conditions
    assert parse_weight("0.5: cosine>0.9")[0] == 0.5
    for wrong in (
        "",
        "cosine >",
        "cosine>high",
        "__import__('os')",
        "cosine>0.9 or x<1",
        "ches highest 0%",
        "a b",
    ):
        with pytest.raises(ConfigError):
            parse_rule(wrong)
    for wrong in ("cosine>0.9", "-1: cosine>0.9", "inf: truncated", "x: truncated"):
        with pytest.raises(ConfigError, match="NUMBER: RULE"):
            parse_weight(wrong)


def test_a_rule_matches_what_it_says_and_no_pair_without_the_number():
    table = pd.DataFrame(
        {
            "cosine": [0.1, 0.95, np.nan, 0.95],
            "truncated": [True, False, True, True],
            "kind": ["a", "b", None, "b"],
            "regime": "ideal",
        }
    )

    def hits(text: str) -> list[int]:
        return np.flatnonzero(matches(parse_rule(text), table)).tolist()

    assert hits("cosine>0.9") == [1, 3]
    assert hits("cosine!=0.95") == [0]
    assert hits("truncated") == [0, 2, 3]
    assert hits("cosine>0.9 and truncated") == [3]
    assert hits("kind==b") == [1, 3] and hits("kind!=b") == [0]
    assert hits("cosine highest 34%") == [1] and hits("cosine lowest 67%") == [0, 1]
    for wrong in (
        "nothing>1",
        "kind>1",
        "kind==1",
        "cosine==b",
        "cosine",
        "truncated==1",
        "regime==bothdown",
    ):
        with pytest.raises(ConfigError, match=r"asks for|can't be compared|isn't a flag|isn't a regime"):
            matches(parse_rule(wrong), table)


def test_decisions_keep_the_order_multiply_weights_and_name_reasons():
    table = pd.DataFrame({"cosine": [0.1, 0.6, 0.95]}, index=[0, 2, 3])
    weights = [(0.5, parse_rule("cosine>0.5")), (0.2, parse_rule("cosine<0.7"))]
    made = decide(table, 5, [parse_rule("cosine>0.9")], weights)
    assert made["index"].tolist() == list(range(5))
    assert made["keep"].tolist() == [True, True, True, False, True]
    assert made["weight"].tolist() == pytest.approx([0.2, 1.0, 0.1, 0.5, 1.0])
    assert made["reasons"].tolist() == [
        "cosine<0.7 (weight 0.2)",
        "unprobed",
        "cosine>0.5 (weight 0.5); cosine<0.7 (weight 0.2)",
        "cosine>0.9; cosine>0.5 (weight 0.5)",
        "unprobed",
    ]
    assert not decide(table, 5, [], weights, keeps_unprobed=False)["keep"][1]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_what_stays_is_written_as_it_was_in_every_format(suffix, policy, files, tmp_path):
    """Columns, order and values of the kept rows are the source's own; scores are beside them."""
    run = probe_of(policy, files[suffix], tmp_path / "run")
    out = tmp_path / f"out.{suffix}"
    done = filtered(run, out, drop=("cosine highest 30%", "duplicate_pair"), weight=("0.5: length_ratio>1",))
    kept = done.decisions.loc[done.decisions["keep"], "index"].tolist()
    assert 11 not in kept and 2 in kept or done.decisions.loc[2, "reasons"].startswith("cosine")
    options = data_options_of(ProbeResult.load(run))
    before, after = (StoredData.read(path, options).content for path in (files[suffix], out))
    if suffix == "parquet":
        assert isinstance(before, pa.Table) and isinstance(after, pa.Table)
        assert after.select(before.column_names).equals(before.take(kept))
        assert after.schema.metadata[b"origin"] == b"here"
        before, after = before.to_pylist(), after.to_pylist()
    names = list(before[0])
    assert [{name: row[name] for name in names} for row in after] == [before[i] for i in kept]
    assert [row["id"] for row in after] == [f"00{i}" for i in kept]
    added = list(after[0])[len(names) :]
    assert added == [
        "entangle_cosine",
        "entangle_norm_ratio",
        "entangle_regime",
        "entangle_change_chosen",
        "entangle_change_rejected",
        "entangle_slack",
        "entangle_length_ratio",
        "entangle_ches",
        "entangle_ches_norm",
        "entangle_edit_distance",
        "entangle_reasons",
        "weight",
    ]
    rows = ProbeResult.load(run).pairs.set_index("index")
    for i, row in zip(kept, after, strict=True):
        assert isinstance(row["entangle_cosine"], str if suffix == "csv" else float)
        assert float(row["entangle_cosine"]) == rows.loc[i, "cosine"]
        longer = rows.loc[i, "length_rejected"] > rows.loc[i, "length_chosen"]
        assert float(row["weight"]) == (0.5 if longer else 1.0)
    assert [pair.chosen for pair in load_pairs(out)] == [load_pairs(files[suffix])[i].chosen for i in kept]


@pytest.mark.parametrize("formulas", ["say", "quote"])
def test_texts_that_a_spreadsheet_would_run(formulas, policy, tmp_path):
    """Said and left, or an apostrophe before each; numbers below 0 aren't formulas."""
    rows = [
        {"prompt": f"the cat {k}", "chosen": "=1+1", "rejected": "+ no", "note": "@x", "score": -1.5}
        for k in range(4)
    ]
    source, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    pd.DataFrame(rows).to_csv(source, index=False)
    run = probe_of(policy, source, tmp_path / "run")
    done = filtered(run, out, drop=("cosine highest 25%",), formulas=formulas)
    kept = pd.read_csv(out, dtype=str)
    before = "'" if formulas == "quote" else ""
    assert kept["chosen"].unique().tolist() == [before + "=1+1"] and kept["note"].iloc[0] == before + "@x"
    assert kept["score"].iloc[0] == "-1.5"
    assert done.summary["formulas"] == 9
    assert "9 texts" in done.table(80).replace("\n", " ")


def test_provenance_names_run_rules_hashes_and_every_row_that_went(run, files, tmp_path):
    out = tmp_path / "out.jsonl"
    done = filtered(run, out, drop=("cosine highest 30%",))
    record = json.loads(Path(f"{out}.provenance.json").read_text())
    assert record["run"] == run and record["drop"] == ["cosine highest 30%"]
    assert record["source"]["sha256"] == hashlib.sha256(files["jsonl"].read_bytes()).hexdigest()
    assert record["out"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert record["identity"]["data"] == record["source"]["fingerprint"]
    gone = done.decisions[~done.decisions["keep"]]
    assert record["dropped"] == {str(i): "cosine highest 30%" for i in gone["index"]} and len(gone) == 3
    summary = record["summary"]
    assert (summary["rows"], summary["kept"], summary["dropped"]) == (12, 9, 3)
    assert summary["rules"] == {"cosine highest 30%": {"matched": 3, "alone": 3}}
    assert summary["after"]["median_cosine"] < summary["before"]["median_cosine"]
    assert "12 rows: 9 kept, 3 dropped" in done.table()


def test_regimes_and_slack_are_of_the_loss_asked_for(run, tmp_path):
    probe = ProbeResult.load(run)
    pairs = load_pairs(data_options_of(probe).dataset_name)
    for loss in ("dpo", "simpo"):
        table = pair_table(probe, pairs, loss)
        judged = probe.predictions[probe.predictions["loss"] == loss].set_index("index")
        assert (table["regime"] == judged["regime"]).all() and (table["slack"] == judged["slack"]).all()
        done = filtered(run, tmp_path / f"{loss}.jsonl", drop=("slack<0",), loss=loss)
        assert done.summary["dropped"] == int((judged["slack"] < 0).sum())
    with pytest.raises(ConfigError, match="kto isn't among the losses"):
        filtered(run, tmp_path / "kto.jsonl", drop=("slack<0",), loss="kto")


def test_duplicates_and_near_duplicates_are_found_in_the_texts(run):
    table = pair_table(
        ProbeResult.load(run), load_pairs(data_options_of(ProbeResult.load(run)).dataset_name), "dpo"
    )
    assert table.index[table["duplicate_pair"]].tolist() == [11]
    assert table.index[table["duplicate_prompt"]].tolist() == [11]
    assert table["text_distance"].between(0, 1).all()


def test_a_limited_run_leaves_the_other_rows_alone(policy, files, tmp_path):
    run = probe_of(policy, files["jsonl"], tmp_path / "run", limit=5, seed=1)
    done = filtered(run, tmp_path / "out.jsonl", drop=("cosine>-2",))
    probed = set(ProbeResult.load(run).pairs["index"])
    assert len(probed) == 5 and done.summary["unprobed"] == 7
    assert set(done.decisions.loc[~done.decisions["keep"], "index"]) == probed
    assert len(load_pairs(tmp_path / "out.jsonl")) == 7
    done = filtered(run, tmp_path / "none.jsonl", drop=("cosine>2",), unprobed="drop")
    assert done.summary["kept"] == 5


def test_a_folder_is_exported_to_jsonl_or_parquet(policy, files, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(files["parquet"], folder / "train.parquet")
    run = probe_of(policy, folder, tmp_path / "run")
    texts = [pair.chosen for pair in load_pairs(files["parquet"])]
    for suffix in ("jsonl", "parquet"):
        filtered(run, tmp_path / f"out.{suffix}", drop=("cosine>2",))
        assert [pair.chosen for pair in load_pairs(tmp_path / f"out.{suffix}")] == texts
    with pytest.raises(ConfigError, match=r"suffix .jsonl or .parquet"):
        filtered(run, tmp_path / "out.csv", drop=("truncated",))


def test_dry_run_writes_nothing(run, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = filtered(run, tmp_path / "out.jsonl", drop=("cosine>-2",), dry_run=True)
    assert done.summary["kept"] == 0 and sorted(tmp_path.iterdir()) == before


def test_changed_data_is_refused(policy, files, tmp_path):
    data = tmp_path / "rows.jsonl"
    shutil.copy(files["jsonl"], data)
    run = probe_of(policy, data, tmp_path / "run")
    data.write_text(data.read_text().replace("cat", "dog"))
    with pytest.raises(RunError, match="isn't the data that"):
        filtered(run, tmp_path / "out.jsonl", drop=("truncated",))
    data.unlink()
    with pytest.raises(ValueError, match="there is none"):
        filtered(run, tmp_path / "out.jsonl", drop=("truncated",))
    assert not (tmp_path / "out.jsonl").exists()


def test_what_cannot_be_done_is_refused_by_name(run, files, tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match="at least one rule"):
        filtered(run, out)
    with pytest.raises(ConfigError, match="suffix .jsonl"):
        filtered(run, tmp_path / "out.csv", drop=("truncated",))
    with pytest.raises(ConfigError, match="is the data set itself"):
        filtered(run, files["jsonl"], drop=("truncated",), overwrite=True)
    with pytest.raises(ConfigError, match="drop every row"):
        filtered(run, out, drop=("cosine>-2",))
    with pytest.raises(ConfigError, match="diagnostics squeezing_chosen"):
        filtered(run, out, drop=("squeezing_chosen>0",))
    with pytest.raises(ConfigError, match="already"):
        filtered(run, out, weight=("0.5: truncated",), weight_column="score")
    filtered(run, out, drop=("truncated",))
    with pytest.raises(ConfigError, match="exists"):
        filtered(run, out, drop=("truncated",))
    filtered(run, out, drop=("truncated",), overwrite=True)


def test_command_on_the_embedded_pairs(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["probe", "--limit", "6", "--losses", "dpo", "--output_dir", str(run)]) == 0
    out = tmp_path / "kept.jsonl"
    capsys.readouterr()
    assert main(["filter", str(run), "--out", str(out), "--drop", "cosine highest 50%"]) == 0
    assert "72 rows: 69 kept, 3 dropped, 66 unprobed" in capsys.readouterr().out
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    originals = [json.loads(line) for line in embedded.PAIRS.read_text().splitlines()]
    assert [row["prompt"] for row in kept[3:]] == [row["prompt"] for row in originals[6:]]
    assert main(["filter", str(run), "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "at least one rule" in capsys.readouterr().err
