"""Logs in every format that trackers leave, all made from one real trainer_state.json."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from entangle.cli import main
from entangle.doctor import TrainingLog, examine, read_log
from entangle.errors import DataError

LOGS = Path(__file__).parent / "logs"
STATE = LOGS / "dpo-similar-0" / "trainer_state.json"
HISTORY = [row for row in json.loads(STATE.read_text())["log_history"] if "train_runtime" not in row]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def same_verdict(log: TrainingLog) -> None:
    expected = examine(read_log(STATE))
    found = examine(log)
    assert len(log.train) == len(expected.log.train)
    assert [f.rule for f in found.findings] == [f.rule for f in expected.findings] != []
    for one, other in zip(found.findings, expected.findings, strict=True):
        assert one.numbers == pytest.approx(other.numbers, rel=1e-5) and one.step == other.step


def test_wandb_table_with_its_own_step_and_prefixes(tmp_path):
    rows = [
        {f"train/{k}": v for k, v in row.items() if k != "step"}
        | {"_step": i, "train/global_step": row["step"]}
        for i, row in enumerate(HISTORY)
    ]
    same_verdict(read_log(write_csv(tmp_path / "wandb.csv", rows)))


def test_wandb_charts(tmp_path):
    """One file per chart, with minimum and maximum beside; the charts of a run joined by hand."""
    rows = []
    for row in HISTORY:
        out: dict = {"Step": row["step"]}
        for key, value in row.items():
            out |= {f"sunny-1 - train/{key}{end}": value for end in ("", "__MIN", "__MAX")}
        rows.append(out)
    same_verdict(read_log(write_csv(tmp_path / "chart.csv", rows)))
    both = [row | {"rainy-2 - train/rewards/chosen": 0} for row in rows]
    with pytest.raises(DataError, match="several runs"):
        read_log(write_csv(tmp_path / "two.csv", both))


def test_json_lines(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in HISTORY) + "\n")
    same_verdict(read_log(file))


def test_tensorboard_csv_files_of_a_folder_are_one_log(tmp_path):
    for key in HISTORY[0]:
        if key not in ("step", "epoch"):
            rows = [
                {"Wall time": 1.0 * i, "Step": row["step"], "Value": row[key]}
                for i, row in enumerate(HISTORY)
            ]
            write_csv(tmp_path / f"run-x-tag-train_{key.replace('/', '_')}.csv", rows)
    log = read_log(tmp_path)
    assert {"rewards/chosen", "logps/rejected", "grad_norm", "entangle/still_training"} <= set(log.train)
    same_verdict(log)


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder = tmp_path / "runs" / "Nov21"
    writer = EventFileWriter(str(folder))
    for row in HISTORY:
        values = [Summary.Value(tag=f"train/{k}", simple_value=v) for k, v in row.items() if k != "step"]
        writer.add_event(Event(step=row["step"], summary=Summary(value=values)))
    writer.close()
    same_verdict(read_log(tmp_path))
    same_verdict(read_log(next(folder.iterdir())))


def test_trackio_database(tmp_path):
    """The tables as trackio 0.43 makes them; the run that logged last is read."""
    file = tmp_path / "project.db"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE metrics (timestamp TEXT, run_name TEXT, step INTEGER, metrics TEXT)")
        old = [("2026-01-01", "old", i, json.dumps({"train/loss": 1.0})) for i in range(9)]
        new = [
            ("2026-01-02", "new", row["step"], json.dumps({f"train/{k}": v for k, v in row.items()}))
            for row in HISTORY
        ]
        database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", old + new)
    same_verdict(read_log(file))


def test_folder_gives_its_newest_run_and_that_run_s_last_checkpoint(tmp_path):
    whole = json.loads(STATE.read_text())
    for run, age in (("old", 200), ("new", 0)):
        for rows in (10, len(whole["log_history"])):
            folder = tmp_path / run / f"checkpoint-{2 * rows}"
            folder.mkdir(parents=True)
            state = whole | {"log_history": whole["log_history"][:rows]}
            (folder / "trainer_state.json").write_text(json.dumps(state))
            then = STATE.stat().st_mtime - age
            os.utime(folder / "trainer_state.json", (then, then))
    # the last checkpoint counts, even if an earlier one was touched since
    os.utime(tmp_path / "new" / "checkpoint-20" / "trainer_state.json")
    log = read_log(tmp_path)
    assert "new" in log.path and "checkpoint-20/" not in log.path
    same_verdict(log)


def test_trainer_is_read_from_the_model_card(tmp_path):
    folder = tmp_path / "checkpoint-40"
    folder.mkdir()
    shutil.copy(STATE, folder)
    (tmp_path / "README.md").write_text(
        "---\ntags:\n- generated_from_trainer\n- orpo\n- trl\n---\n# A model\n"
    )
    log = read_log(tmp_path)
    assert log.trainer == "orpo" and "means over a response's tokens" in " ".join(examine(log).meanings)
    assert read_log(tmp_path, "dpo").trainer == "dpo"
    (tmp_path / "README.md").write_text("---\ntags: [: broken\n---\n")
    assert read_log(tmp_path).trainer is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("trainer_state.json", "{}", "log_history"),
        ("trainer_state.json", "{not json", "isn't a readable"),
        ("trainer_state.json", '{"log_history": []}', "found none"),
        ("x.csv", "a,b\n1,2\n", "found none"),
        ("x.csv", "step,loss\n1,2\n", "metrics of a preference run"),
        ("x.csv", "step,rewards/chosen,rewards/rejected\n1,0,0\n2,0,0\n", "at least 5 logged rows"),
        ("x.db", "nothing", "isn't a readable"),
        ("x.txt", "nothing", "Expected a .json"),
        ("readme.md", "nothing", "Expected a .json"),
    ],
)
def test_what_is_no_log_is_refused_with_status_2(name, content, words, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert main(["doctor", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err


def test_nothing_there_is_refused_with_status_2(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "none")]) == 2
    assert main(["doctor", str(tmp_path)]) == 2
    assert main(["doctor"]) == 2
    assert "save_strategy" in capsys.readouterr().err


def test_doctor_needs_no_torch():
    program = (
        "import sys; from entangle.cli import main; "
        f"status = main(['doctor', {str(STATE)!r}]); sys.exit(10 * ('torch' in sys.modules) + status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "coupled_fall" in done.stdout, done.stderr
