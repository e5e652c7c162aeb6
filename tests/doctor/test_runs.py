"""Two runs in one file or folder are never taken for one: the last is judged, and that is said."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time

import pytest

from entangle.doctor import examine, read_log
from entangle.doctor.runs import last_run
from tests.doctor.made import log_of, pairs, report_of, write_lines, write_state

OLD = pairs(rows=25, chosen=-2.0, rejected=-3.0, seed=1)
NEW = pairs(rows=15, seed=2)


def is_the_new_run(log):
    assert list(log.train.index) == [row["step"] for row in NEW]
    assert log.train["rewards/chosen"].tolist() == pytest.approx(
        [row["rewards/chosen"] for row in NEW], rel=1e-6
    )


def test_steps_that_go_back_in_a_file(tmp_path):
    assert "coupled_fall" in {finding.rule for finding in report_of(OLD).findings}
    log = read_log(write_lines(tmp_path / "log.jsonl", OLD + NEW))
    is_the_new_run(log)
    assert "go back, from 175 to 7" in log.notes[0] and "steps 7 to 105" in log.notes[0]
    assert examine(log).exit_status == 0
    is_the_new_run(read_log(write_state(tmp_path, OLD + NEW)))


def test_three_runs_and_evaluations_in_between():
    evaluations = [{"step": row["step"], "eval_rewards/chosen": 0.0} for row in NEW[::3]]
    log = log_of(OLD + NEW + OLD[:4] + sorted(NEW + evaluations, key=lambda row: row["step"]))
    is_the_new_run(log)
    assert len(log.evaluation) == 5 and "4 runs" in log.notes[0]


def test_a_resumed_part_is_not_joined_to_steps_that_were_done_twice():
    log = log_of(NEW[:10] + NEW[7:])
    assert list(log.train.index) == [row["step"] for row in NEW[7:]] and "resumed" in log.notes[0]


def test_one_run_newest_first_or_shuffled_is_whole():
    is_the_new_run(log_of(NEW[::-1]))
    shuffled = list(NEW)
    random.Random(3).shuffle(shuffled)
    log = log_of(shuffled)
    is_the_new_run(log)
    assert log.notes == ()
    assert last_run([]) == ([], "")


@pytest.mark.parametrize("files", [1, 2])
def test_event_files_of_two_runs_in_one_folder(tmp_path, files):
    """Each run in its own file, or both in one, as a writer that is kept open leaves them."""
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(tmp_path), filename_suffix=".0")
    for number, rows in enumerate((OLD, NEW)):
        if number and files == 2:
            writer.close()
            time.sleep(1.1)  # file names have seconds
            writer = EventFileWriter(str(tmp_path), filename_suffix=".1")
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=1, wall_time=1e9 + 1e4 * number, session_log=start))
        for row in rows:
            values = [Summary.Value(tag=f"train/{k}", simple_value=v) for k, v in row.items() if k != "step"]
            wall = 1e9 + 1e4 * number + row["step"]
            writer.add_event(Event(step=row["step"], wall_time=wall, summary=Summary(value=values)))
    writer.close()
    log = read_log(tmp_path)
    is_the_new_run(log)
    assert "go back" in log.notes[0]


def test_a_run_started_again_under_its_name_in_trackio(tmp_path):
    with sqlite3.connect(tmp_path / "a.db") as database:
        database.execute("CREATE TABLE metrics (timestamp TEXT, run_name TEXT, step INTEGER, metrics TEXT)")
        for number, row in enumerate(OLD + NEW):
            values = (f"2026-02-02T{number:06d}", "mine", row["step"], json.dumps(row))
            database.execute("INSERT INTO metrics VALUES (?, ?, ?, ?)", values)
    is_the_new_run(read_log(tmp_path / "a.db"))


def test_checkpoints_of_two_runs_in_one_folder(tmp_path):
    """The old run was longer; the new one wrote last."""
    for name, rows, age in (("70", OLD[:10], 90), ("175", OLD, 80), ("35", NEW[:5], 20), ("105", NEW, 10)):
        file = write_state(tmp_path / f"checkpoint-{name}", rows)
        os.utime(file, (time.time() - age,) * 2)
    log = read_log(tmp_path)
    is_the_new_run(log)
    assert "2 checkpoints of another run" in log.notes[0]


def test_runs_in_folders_side_by_side(tmp_path):
    for name, rows, age in (("first", OLD, 50), ("second", NEW, 10)):
        file = write_state(tmp_path / name / "checkpoint-1", rows)
        os.utime(file, (time.time() - age,) * 2)
    log = read_log(tmp_path)
    is_the_new_run(log)
    assert "2 runs are in this folder; the newest, second" in log.notes[0]


def test_tensorboard_tables_of_two_runs_in_one_folder(tmp_path):
    for run, rows, age in (("a", OLD, 50), ("b", NEW, 10)):
        for name in ("rewards_chosen", "rewards_rejected", "loss"):
            lines = [f"{row['step']}.5,{row['step']},{row[name.replace('_', '/')]}" for row in rows]
            file = tmp_path / f"run-{run}-tag-train_{name}.csv"
            file.write_text("\n".join(["Wall time,Step,Value", *lines]))
            os.utime(file, (time.time() - age,) * 2)
    log = read_log(tmp_path)
    is_the_new_run(log)
    assert "2 runs" in log.notes[0]


def test_printed_rows_of_two_runs_are_told_by_their_epoch(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "step"} for row in OLD + NEW]
    (tmp_path / "out.log").write_text("\n".join(map(str, rows)))
    log = read_log(tmp_path / "out.log")
    assert len(log.train) == len(NEW) and any("go back" in note for note in log.notes)
