"""The benchmarks run, and what they time agrees: figures of methods that compute something else mean nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap of attention


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Imports a script of the folder as Python does when it runs it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_every_method_computes_the_same(load, tmp_path, capsys):
    engine: ModuleType = load("engine")
    results = engine.main(["--quick", "--case", *engine.CASES, "--output", str(tmp_path)])
    assert json.loads((tmp_path / "engine-cpu.json").read_text()) == json.loads(json.dumps(results))
    assert (tmp_path / "engine-cpu.md").read_text() in capsys.readouterr().out
    for name, case in engine.CASES.items():
        found = results["cases"][name]
        assert set(found["refused"]) <= {engine.FAST}  # a CPU may not have that route
        assert set(found["seconds_per_pair"]) | set(found["refused"]) == set(case.methods)
        assert set(case.methods) - set(found["error"]) - set(found["refused"]) <= {
            "plain pass",
            "full logits",
        }
        assert all(error < 1e-5 for error in found["error"].values()), (name, found["error"])


def test_a_method_that_computes_something_else_shows(load, monkeypatch):
    engine, methods = load("engine"), load("methods")
    case = engine.CASES["small"]

    def longer(*arguments):
        run = methods.ours(*arguments)
        return lambda: 1.1 * run()

    wrong = engine.replace(case, shape=case.shape.tiny, methods=case.methods | {engine.OURS: longer})
    found = engine.measure_case(wrong, 1, engine.Console(quiet=True), "small")
    assert found["error"][engine.OURS] == pytest.approx(0.1, rel=1e-3)
    assert found["error"]["torch.func vmap"] < 1e-5


def test_verdicts_follow_the_medians(load):
    engine = load("engine")
    assert engine._verdict("a", "b", [0.5, 0.9, 0.7], 0.7) == ["a", "b", "0.7 [0.5, 0.9]", "0.70", "yes"]
    assert engine._verdict("a", "b", [0.5, 0.9, 0.71], 0.7)[-1] == "**no**"
    seconds = {"ours": [1.0, 3.0], "plain pass": [2.0, 2.0]}
    assert engine.ratios(seconds, "ours", "plain pass") == [0.5, 1.5]


def test_lengths_are_spread_over_their_range(load):
    methods = load("methods")
    shape = methods.Shape(layers=2, width=16, inner=24, heads=2, vocabulary=48, pairs=4)
    batches = methods.batches_of(shape)
    assert [length for batch in batches for length in batch.prompt_length.tolist()] == [248, 252, 346, 354]
    assert sorted(length for batch in batches for length in batch.lengths.tolist()) == [
        24,
        24,
        31,
        31,
        39,
        39,
        46,
        46,
    ]


def test_gpu_script_runs_on_a_tiny_model(load, tmp_path):
    """Bfloat16 on both sides: cosines agree to its rounding."""
    gpu = load("gpu")
    results = gpu.main(["--device", "cpu", "--tiny", "--repeats", "1", "--output", str(tmp_path)])
    fast, slow = (results["methods"][name]["cosines"] for name in gpu.METHODS)
    assert fast == pytest.approx(slow, abs=0.03) and len(fast) == 4
    assert "times the loop" in (tmp_path / "engine-gpu.md").read_text()


def test_sharing_and_the_probes_share_are_measured(load):
    engine = load("engine")
    for rows in engine.measure_sharing(True, 1).values():
        saved = [row["saved"] for row in rows]
        assert saved == sorted(saved) and all(row["cost"] > 0 for row in rows)
    probe = engine.measure_probe(True)
    assert set(probe["parts"]) == set(engine.AFTER_THE_SCORES)
    assert 0 < probe["share"] < 1


def test_a_dry_run_speaks_of_the_memory_that_a_run_takes(load, tmp_path):
    """Within a factor of 1.6; the benchmark asks for 25 % on more pairs. Resident memory, so a process of its own."""
    bench = load("estimate")
    config = bench.ProbeConfig(limit=4, device="cpu", output_dir=str(tmp_path / "run"))
    (measured, pairs), (estimated, scored) = bench.apart(bench.used, config), bench.promised(config)
    assert pairs == scored == 4
    assert measured["MB"] / 1.6 < estimated["MB"] < 1.6 * measured["MB"]
    text = bench.render(
        {
            "conditions": bench.conditions(),
            "settings": [{"title": "a", "pairs": 4, "estimated": estimated, "measured": measured}],
        }
    )
    assert "| a | 4 |" in text and "of 2 estimates are within 25 %" in text
