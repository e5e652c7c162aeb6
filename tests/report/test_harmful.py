"""A real training that harms: its page says so, since when and on which pairs, though each pair is fine alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import entangle.embedded
from entangle.cli import main
from entangle.report.command import load_sources
from entangle.report.page import render_page
from entangle.report.verdict import decision

SHORT = 160
"""Characters of a prompt that are kept, so that it is quick."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of DPO at a high rate on near-identical responses, a third of the prompts held out."""
    folder = tmp_path_factory.mktemp("harmful")
    pairs = Path(entangle.embedded.__file__).parent / "pairs.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines = [json.dumps(row | {"prompt": row["prompt"][-SHORT:]}) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    options = {
        "dataset_name": folder / "pairs.jsonl",
        "model_name_or_path": "embedded",
        "loss": "dpo",
        "learning_rate": "3e-3",
        "max_steps": 10,
        "save_steps": 0,
        "probe_every": 5,
        "per_device_train_batch_size": 4,
        "eval_share": 0.3,
        "output_dir": folder / "run",
    }
    assert (
        main(["train", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]) == 0
    )
    return folder / "run"


def test_the_page_of_a_harmful_training_says_so(run):
    source = load_sources([run])[0]
    found = decision(source)
    assert found is not None and found.verdict == "harmful" and len(found.pairs) == 5
    assert found.headline.startswith("Harmful: training has lowered the mean chosen log-prob by step 10")
    assert "held-out pairs" in found.headline and "(95 % interval -" in found.headline
    assert any("the chosen fell below its start for good" in sentence for sentence in found.details)
    assert source.steps is not None  # and each pair alone was predicted to be fine
    assert (source.steps[source.steps["step"] == 0]["regime"] == "ideal").mean() > 0.8
    page = render_page([source])
    top = page[: page.index("Over training</h2>")]
    assert found.headline in top and "no change is needed" not in page
    assert "pairs.jsonl, " in top and "Look at pair" in top
