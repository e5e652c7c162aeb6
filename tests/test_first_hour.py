"""The first hour of a newcomer: a model, pairs, a run of plain TRL and its YAML, and what one would type."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from entangle.cli import main
from tests.falling import falling_pairs, saved_base, trained

YAML = {
    "model_name_or_path": "sft-model",
    "dataset_name": "pairs.jsonl",
    "output_dir": "dpo-out",
    "loss_type": "ipo",
    "beta": 0.2,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.05,
    "max_steps": 2,
    "save_strategy": "no",
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
}
"""A YAML of `trl dpo`, as people have it."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft-model, pairs.jsonl, dpo.yaml, and dpo-out with three checkpoints of plain TRL."""
    folder = tmp_path_factory.mktemp("hour")
    base = saved_base(folder / "sft-model")
    falling_pairs().to_json(folder / "pairs.jsonl")
    trained(folder / "dpo-out", base)
    (folder / "dpo.yaml").write_text(yaml.safe_dump(YAML))
    (folder / "empty.jsonl").write_text("")
    (folder / "torn.jsonl").write_text(
        '{"prompt": "w1", "chosen": " w2", "rejected": " w3"}\n{"prompt": "w1"}\n'
    )
    return folder


MINE = "--model_name_or_path sft-model --dataset_name pairs.jsonl"

HOUR = (
    # something is wrong with my run
    ("doctor dpo-out", 1, "reward"),
    ("why dpo-out --dataset_name pairs.jsonl --minutes 1", 1, "falling yes"),
    # my model, my pairs
    (f"probe {MINE} --losses dpo cpo --output_dir run", 0, "The set as one pair"),
    (f"probe {MINE} --losses dpo cpo --output_dir run", 0, "holds this run already"),
    ("whatif run", 0, "Smallest change"),
    ("tokens run --pairs 0", 0, "Pair 0"),
    ("across run", 0, "Over an epoch"),
    ("forecast run --per_device_train_batch_size 4", 0, "gradients held as they are"),
    ("filter run --drop kind==odd --out kept.jsonl", 0, "12 kept, 12 dropped"),
    ("report run", 0, "report.html"),
    # my YAML
    (
        "probe --config dpo.yaml --output_dir by-yaml",
        0,
        "Judged is the loss that the file trains with: ipo_avg",
    ),
    ("train --config dpo.yaml", 2, "holds no run of entangle, so it stays"),
    ("train --config dpo.yaml --output_dir again", 0, "2 steps on"),
    ("compare --config dpo.yaml --seeds 0 --output_dir compared", 0, "ipo_avg"),
    # my run's checkpoints
    ("sweep dpo-out --dataset_name pairs.jsonl --limit 16", 0, "Change since the start"),
    ("report dpo-out", 2, "entangle sweep dpo-out"),
    # what goes wrong at first
    ("probe --model_name_or_path sft-model", 2, "--dataset_name"),
    ("probe --dataset_name pairs.jsonl", 2, "--model_name_or_path"),
    ("probe --model_name_or_path ./sft-modle --dataset_name pairs.jsonl", 2, "sft-model"),
    ("probe --model_name_or_path sft-model --dataset_name pairs.json", 2, "Is 'pairs.jsonl' meant?"),
    ("probe --model_name_or_path sft-model --dataset_name empty.jsonl", 2, "empty"),
    ("probe --model_name_or_path sft-model --dataset_name torn.jsonl", 2, "Row 1"),
    (f"probe {MINE} --losses sigmoid", 2, "TRL's sigmoid is dpo here"),
    (f"probe {MINE} --losses dpo simp", 2, "Did you mean simpo?"),
    ("whatif runn", 2, "Is 'run' meant?"),
    ("doctor pairs.jsonl", 2, "log"),
    ("probee", 2, "unknown command"),
)
"""What is typed, in order; the exit status, and what must be among the words of the answer."""


def test_the_first_hour(place, monkeypatch, capfd):
    """Every command gives the right answer or a right refusal, with nothing of a library's own in between."""
    monkeypatch.chdir(place)
    wrong = []
    for line, status, words in HOUR:
        try:
            found = main(line.split())
        except SystemExit as exit:
            found = exit.code
        printed = capfd.readouterr()
        said = " ".join((printed.out + printed.err).split())
        if found != status or words not in said or "Traceback" in said or "Is 'dpo-out' meant" in said:
            wrong.append(f"$ entangle {line}\nexpected {status} and {words!r}, got {found}:\n{said[-1500:]}")
    assert not wrong, "\n\n".join(wrong)
