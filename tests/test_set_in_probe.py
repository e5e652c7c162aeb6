"""The set's block as every probe leaves it: against the whole Gram matrix, through interruptions, and in a what-if."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from entangle.analysis.set_verdict import FALL, IDEAL, RISE, UNKNOWN, UNSURE, finding, set_verdict
from entangle.commands.whatif import what_if
from entangle.config import ProbeConfig
from entangle.data import tokenize_pair
from entangle.errors import RunError
from entangle.measure.inputs import load_pairs_of, load_policy_of
from entangle.measure.set_content import geometry_of_content
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted
from entangle.scores import make_engine, score_gram
from tests.probing import options, probe


def content_of(path: Path) -> dict:
    return json.loads((path / "set.json").read_text())


def gram_of(config: ProbeConfig) -> torch.Tensor:
    """K of all rows, chosen ones first, by written-out scores."""
    policy = load_policy_of(config)
    pairs = [tokenize_pair(policy.tokenizer, pair, config.max_length) for pair in load_pairs_of(config)]
    engine = make_engine(policy.model, policy.parameters)
    found = score_gram(engine, [policy.collate([pair]) for pair in pairs])
    order = torch.cat([torch.arange(0, 2 * len(pairs), 2), torch.arange(1, 2 * len(pairs), 2)])
    return found[order][:, order]


@pytest.mark.parametrize(
    "changes", [{}, {"parameters": "full", "adapter_name_or_path": None, "reference": "self"}]
)
def test_block_is_the_mean_over_pairs_of_different_prompts(inputs, tmp_path, changes):
    """In float64, to 1e-9 of the Gram matrix of all rows, whatever the shards and the diagnostics beside it."""
    config = options(inputs, tmp_path / "run", dtype="float64", **changes)
    probe(config)
    content, gram = content_of(tmp_path / "run"), gram_of(config)
    n = len(gram) // 2
    apart = ~torch.eye(n, dtype=torch.bool)
    for name, block in (
        ("sq_chosen", gram[:n, :n]),
        ("inner", gram[:n, n:]),
        ("sq_rejected", gram[n:, n:]),
    ):
        expected = float(block[apart].mean())
        assert content[name]["value"] == pytest.approx(expected, rel=1e-9)
        assert content["own"][name] == pytest.approx(float(block.diagonal().mean()), rel=1e-9)
    assert content["pairs"] == content["prompts"] == n
    parts = sum(layer["sq_chosen"]["value"] for layer in content["layers"].values())
    assert parts == pytest.approx(content["sq_chosen"]["value"], rel=1e-9)


def test_pairs_of_one_prompt_never_count_as_different(inputs, tmp_path):
    """The same pair three times under one prompt adds own terms, no products between pairs."""
    rows = [json.loads(line) for line in Path(inputs["data"]).read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows[:5], rows[4], rows[4]])
    )
    config = options(inputs, tmp_path / "run", dtype="float64", dataset_name=str(tmp_path / "rows.jsonl"))
    probe(config)
    content, gram = content_of(tmp_path / "run"), gram_of(config)
    prompt = torch.tensor([0, 1, 2, 3, 4, 4, 4])
    apart = prompt[:, None] != prompt
    assert content["prompts"] == 5 and content["pairs"] == 7
    assert content["inner"]["value"] == pytest.approx(float(gram[:7, 7:][apart].mean()), rel=1e-9)


def test_broken_run_sums_every_pair_once(inputs, tmp_path, monkeypatch):
    write = RunFolder.write_shard

    def press(self, folder, number, rows):
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, folder, number, rows)

    monkeypatch.setattr(RunFolder, "write_shard", press)
    with pytest.raises(Interrupted):
        probe(options(inputs, tmp_path / "run", dtype="float64"))
    monkeypatch.undo()

    def die(self, folder, number, rows):
        if number == 3:  # its sums are kept, its rows are not
            raise RuntimeError("killed")
        write(self, folder, number, rows)

    monkeypatch.setattr(RunFolder, "write_shard", die)
    with pytest.raises(RuntimeError, match="killed"):
        probe(options(inputs, tmp_path / "run", dtype="float64"))
    monkeypatch.undo()
    probe(options(inputs, tmp_path / "run", dtype="float64"))
    probe(options(inputs, tmp_path / "unbroken", dtype="float64"))
    broken, whole = content_of(tmp_path / "run"), content_of(tmp_path / "unbroken")
    assert broken["sums"]["pairs"] == whole["sums"]["pairs"]
    np.testing.assert_allclose(broken["sums"]["products"], whole["sums"]["products"], rtol=1e-9, atol=1e-12)
    assert not (tmp_path / "run" / "sums").exists()


def test_kinds_have_a_block_of_their_own(inputs, tmp_path):
    """Means over the kinds' blocks give the set's, weighted by numbers of pairs of pairs."""
    probe(options(inputs, tmp_path / "run", dtype="float64"))
    content = content_of(tmp_path / "run")
    blocks = {(row["of"], row["by"]): row for row in content["kinds"]["block"]}
    assert content["kinds"]["column"] == "kind" and set(blocks) == {(a, b) for a in "ab" for b in "ab"}
    weights = {(a, b): 5 * (4 if a == b else 5) for a, b in blocks}
    mean = sum(weights[k] * row["inner"]["value"] for k, row in blocks.items()) / sum(weights.values())
    assert mean == pytest.approx(content["inner"]["value"], rel=1e-9)


def test_the_words_come_first_and_say_nothing_that_isnt_known(inputs, tmp_path):
    result = probe(options(inputs, tmp_path / "run"))
    shown = result.table()
    assert shown.index("The set as one pair") < shown.index("Share of pairs per regime")
    assert "Each pair alone" in shown and set_verdict(result.summary["set"], "dpo")[:30] in " ".join(
        shown.split()
    )


def move(value: float, low: float | None, high: float | None, **more) -> dict:
    drift = {"value": value, "low": low, "high": high, "has_meaning": low is not None, "pairs_needed": None}
    return {"drift": drift, "regime": "degenerate", "is_certain": False} | more


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (move(3.3, 2.2, 4.4), RISE),
        (move(-2.0, -3.0, -0.6), FALL),
        (move(0.1, -0.3, 0.4), IDEAL),
        (move(0.4, 0.1, 0.9), UNSURE),
        (move(0.4, None, None), UNKNOWN),
        (move(float("nan"), None, None, regime="both_up", is_certain=True), RISE),
        (move(float("nan"), None, None, regime="ideal", is_certain=True), IDEAL),
    ],
)
def test_finding_is_what_the_interval_allows(found, expected):
    assert finding(found) == expected


def test_whatif_finds_the_edge_of_the_sets_drift(inputs, tmp_path):
    """At the setting the set's regime is ideal, a little before it isn't; other losses are judged by the same sums."""
    probe(options(inputs, tmp_path / "run", dtype="float64"))
    result = what_if(tmp_path / "run", ["dpo", "cpo"], knobs=("nll_sum", "shift"))
    whole, content = result.summary["set"], content_of(tmp_path / "run")
    geometry = geometry_of_content(content)
    for name in ("chosen", "rejected", "margin"):
        value = content["losses"]["dpo"][name]["value"]
        assert whole["losses"]["dpo"][name]["value"] == pytest.approx(value, rel=1e-9)
    u_ww, u_wl, u_ll = (float(geometry.products[i, j]) for i, j in ((0, 0), (0, 1), (1, 1)))
    low, high = max(u_wl / u_ww, 0.0), u_ll / u_wl if u_wl > 0 else np.inf
    shift = next(change for change in whole["changes"] if change["knob"] == "shift")
    if low < 1 < high:
        assert shift["setting"] == shift["start"] == 1.0
    elif high <= low or high < 1:
        assert shift["setting"] is None  # shifting only raises rho
    else:
        assert 1 / shift["setting"] == pytest.approx(low, rel=5e-3)
    assert "the set" in result.summary["recommendation"].lower()


def test_what_isnt_measured_is_said(inputs, tmp_path, capsys):
    """A single prompt has no set: the run says so, and asking for it is answered in the same words."""
    from rich.console import Console

    from entangle.commands.probe import run_probe

    result = run_probe(options(inputs, tmp_path / "run", limit=1), Console(stderr=True))
    assert "The set of pairs as one isn't measured" in " ".join(capsys.readouterr().err.split())
    assert "set" not in result.summary and not (tmp_path / "run" / "set.json").exists()
    with pytest.raises(RunError, match="two different prompts"):
        _ = result.set
