"""Nothing that comes from outside steers a terminal: every command on names, values and files full of controls."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from entangle.cli import COMMANDS, main
from tests.tiny import save_policy

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x85\u202e"
"""A window's title, a cleared screen, a colour and a line end by C1 bytes, and writing from right to left."""

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a hostile name, that holds a model, pairs, prompts, rollouts and a log full of controls."""
    folder = tmp_path_factory.mktemp("hostile") / "dir\x1b[31m\x85"
    folder.mkdir()
    save_policy(folder / "model\x07\x9b")
    rows = [
        {
            "prompt": f"the cat {EVIL} {k // 2}",
            "chosen": f"sat on {k} {EVIL} mat",
            "rejected": f"they {EVIL} think {k}",
            f"kind{EVIL}": f"value{EVIL}{k % 2}",
        }
        for k in range(6)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rollouts = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "rewards": [1.0, 0.0]}
        for row in rows
    ]
    (folder / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rollouts)))
    log = [
        {
            "step": k,
            "loss": 0.69 - 0.01 * k,
            f"rewards/chosen{EVIL}": -k,
            "rewards/chosen": -k,
            "rewards/rejected": -k,
        }
        for k in range(12)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (folder / "broken.yaml").write_text(f'"losses{EVIL.encode("unicode_escape").decode()}": ["dpo"]\n')
    (folder / "broken.jsonl").write_text(json.dumps({f"a{EVIL}": 1, f"b{EVIL}": EVIL}) + "\n")
    return folder


def words_of(place: Path, text: str) -> list[str]:
    """A command line: names stand for files of the folder."""
    names = {
        "MODEL": "model\x07\x9b",
        "PAIRS": "pairs.jsonl",
        "ROLLOUTS": "rollouts.jsonl",
        "LOG": "log.jsonl",
        "RUN": "run\x1b[7m",
    }
    words = [str(place / names[word]) if word in names else word for word in text.split()]
    return [word.replace("KIND", f"kind{EVIL}").replace("EVIL", EVIL) for word in words]


BASE = "--model_name_or_path MODEL --dataset_name PAIRS --reference self"
LINES = (
    f"probe {BASE} --group_by KIND --losses dpo --output_dir RUN",
    "whatif RUN",
    "tokens RUN",
    "across RUN",
    "forecast RUN --per_device_train_batch_size 2",
    "filter RUN --drop KIND==EVIL --out EVIL.jsonl",
    "filter RUN --drop cosine<2 --dry_run",
    "report RUN",
    "losses EVIL",
    "losses dpo",
    "doctor LOG",
    "doctor EVIL",
    "rft --model_name_or_path MODEL --rollouts ROLLOUTS --output_dir EVIL1",
    f"joint {BASE} --rollouts ROLLOUTS --output_dir EVIL2",
    "train --model_name_or_path MODEL --dataset_name PAIRS --max_steps 1 --save_steps 1 --output_dir EVIL3",
    "sweep EVIL3 --dataset_name PAIRS --output_dir EVIL4",
    "compare --model_name_or_path MODEL --dataset_name PAIRS --losses dpo EVIL",
    "compare --model_name_or_path MODEL --dataset_name PAIRS --losses dpo --max_steps 1 --output_dir EVIL5",
    "report EVIL1",
    "report EVIL2",
    "report EVIL3",
    "report EVIL4",
    "report EVIL5",
    "probe --columns prompt=EVIL --dataset_name PAIRS",
    "probe --config broken.yaml",
    f"probe --losses dpo --output_dir EVIL6 {BASE.replace('PAIRS', 'broken.jsonl')}",
    "probe --model_name_or_path EVIL",
    "EVIL",
)


def test_every_command_is_walked():
    walked = {line.split()[0] for line in LINES}
    assert set(COMMANDS) - walked <= {"why"}


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line.split()[:2]))
def test_nothing_from_outside_steers_the_terminal(line, place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    try:
        status = main(words_of(place, line))
    except SystemExit as exit:
        status = exit.code
    printed = capfd.readouterr()
    for stream in (printed.out, printed.err):
        assert not CONTROLS.search(stream), repr(stream)
    assert status in (0, 1, 2), printed.err
