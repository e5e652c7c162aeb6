"""The files that people have: other trainers', terminals', notebooks', trackers' and spreadsheets'."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from entangle.cli import main
from entangle.doctor import examine, read_log
from entangle.doctor.numbers import has_decimal_comma, plain
from entangle.errors import DataError
from tests.doctor.made import groups, log_of, pairs, write_lines, write_state

ROWS = pairs(chosen=-0.9, rejected=-2.0)
EXPECTED = log_of(ROWS)


def without_steps(rows):
    return [{key: value for key, value in row.items() if key != "step"} for row in rows]


def same(log, rel=1e-6, steps=True):
    """The same rows, and the same verdict: both rewards fall."""
    assert len(log.train) == len(ROWS)
    if steps:
        assert list(log.train.index) == list(EXPECTED.train.index)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert log.train[name].tolist() == pytest.approx(EXPECTED.train[name].tolist(), rel=rel, abs=1e-4), (
            name
        )
    assert "coupled_fall" in {finding.rule for finding in examine(log).findings}


def test_ms_swift(tmp_path):
    rows = [
        row | {"global_step/max_steps": f"{step['step']}/210", "percentage": "3%", "elapsed_time": "1m 2s"}
        for row, step in zip(without_steps(ROWS), ROWS, strict=True)
    ]
    log = read_log(
        write_lines(tmp_path / "logging.jsonl", [*rows, {"train_runtime": 9.0, "train_loss": 0.4}])
    )
    same(log)
    assert log.kind == "ms-swift's logging.jsonl"
    same(read_log(tmp_path))


def test_openrlhf(tmp_path, capsys):
    names = {
        "rewards/chosen": "chosen_reward",
        "rewards/rejected": "reject_reward",
        "loss": "loss",
        "learning_rate": "lr",
    }
    rows = [
        {"train/global_step": row["step"]} | {f"train/{new}": row[old] for old, new in names.items()}
        for row in ROWS
    ]
    file = write_lines(tmp_path / "metrics.jsonl", rows)
    same(read_log(file))
    assert main(["doctor", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "A reward model's training logs the same names" in " ".join(shown.split())


def test_llamafactory_and_what_lies_beside_it(tmp_path, capsys):
    rows = [
        {"current_steps": row["step"], "total_steps": 210, "loss": row["loss"], "accuracy": 0.5, "lr": 1e-6}
        for row in ROWS
    ]
    file = write_lines(tmp_path / "trainer_log.jsonl", rows)
    assert main(["doctor", str(file)]) == 2
    message = capsys.readouterr().err
    assert "LLaMA-Factory's short log" in message and "trainer_state.json in the run's output_dir" in message
    state = write_state(tmp_path / "checkpoint-210", ROWS)
    assert main(["doctor", str(file)]) == 2
    assert f"{state} has them: entangle doctor {state}" in capsys.readouterr().err
    same(read_log(tmp_path))


@pytest.mark.parametrize("nested", [True, False])
def test_verl(tmp_path, capsys, nested):
    metrics = {
        "actor/grad_norm": 0.4,
        "actor/kl_loss": 0.01,
        "critic/score/mean": 0.3,
        "response_length/mean": 99.0,
    }
    rows = [{"step": step, "data": metrics} if nested else {"step": step, **metrics} for step in range(9)]
    assert main(["doctor", str(write_lines(tmp_path / "exp.jsonl", rows))]) == 2
    message = capsys.readouterr().err
    assert "a log of verl" in message and "tensorboard" in message and "entangle rft" in message
    console = "\n".join(f"step:{step} - actor/grad_norm:0.4 - critic/score/mean:0.3" for step in range(9))
    (tmp_path / "verl.log").write_text(console)
    assert main(["doctor", str(tmp_path / "verl.log")]) == 2
    assert "a log of verl" in capsys.readouterr().err


def test_verl_s_names_in_a_tracker_s_table_are_read(tmp_path):
    names = {
        "critic/score/mean": "reward",
        "actor/grad_norm": "grad_norm",
        "actor/kl_loss": "kl",
        "response_length/mean": "completions/mean_length",
        "training/global_step": "step",
    }
    lines = [",".join(names), *(",".join(str(row[old]) for old in names.values()) for row in groups())]
    (tmp_path / "wandb.csv").write_text("\n".join(lines))
    log = read_log(tmp_path / "wandb.csv")
    assert log.train["reward"].tolist() == pytest.approx([row["reward"] for row in groups()])
    assert {"kl", "grad_norm", "completions/mean_length"} <= set(log.train)


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", ["train.log", "nohup.out", "notes.txt", "slurm-12345"])
def test_printed_rows(tmp_path, as_text, name):
    rows = without_steps(ROWS)
    if as_text:  # since transformers 5
        rows = [{key: f"{value:.6g}" for key, value in row.items()} for row in rows]
    lines = ["Loading: 100%|####| 2/2", "{'not': 'a row'}"]
    lines += [f"\x1b[32m 3%|#  | {place}/30 [00:10<01:00]{row}\x1b[0m" for place, row in enumerate(rows)]
    (tmp_path / name).write_text("\n".join([*lines, "{'train_runtime': 3.0, 'train_loss': 0.3}"]))
    log = read_log(tmp_path / name)
    same(log, rel=1e-4, steps=False)
    assert list(log.train.index) == list(range(1, 31)) and "have no steps" in log.notes[0]


def test_printed_rows_with_evaluations_and_words_for_numbers(tmp_path):
    rows = without_steps(ROWS)
    lines = []
    for place, row in enumerate(rows):
        lines.append(str(row | {"grad_norm": float("nan") if place == 3 else 2.0, "logits/chosen": None}))
        if place % 5 == 4:
            lines.append(
                str(
                    {
                        "eval_loss": 0.5,
                        "eval_rewards/chosen": -0.1,
                        "eval_runtime": 2.0,
                        "epoch": row["epoch"],
                    }
                )
            )
    (tmp_path / "a.log").write_text("\n".join(lines))
    log = read_log(tmp_path / "a.log")
    same(log, steps=False)
    assert list(log.evaluation.index) == [5, 10, 15, 20, 25, 30]
    assert [(gap.metric, gap.steps) for gap in log.not_finite] == [("grad_norm", (4,))]


def table_of(names, mark, rows=ROWS, frame=False):
    """A pasted table of the columns named."""
    edge = mark.strip() if frame else ""
    lines = [edge + mark.join(names.values()) + edge]
    if "|" in mark:
        lines.append(edge + mark.join("---" for _ in names) + edge)
    return "\n".join(lines + [edge + mark.join(f"{row[name]:.6f}" for name in names) + edge for row in rows])


NOTEBOOK = {
    "step": "Step",
    "loss": "Training Loss",
    "rewards/chosen": "rewards / chosen",
    "rewards/margins": "rewards / margins",
}


@pytest.mark.parametrize(("mark", "frame"), [(" | ", False), (" | ", True), ("\t", False)])
def test_a_notebook_s_table(tmp_path, mark, frame):
    (tmp_path / "table.md").write_text(
        "Here is what I see:\n\n" + table_of(NOTEBOOK, mark, frame=frame) + "\n\nWhy?\n"
    )
    same(read_log(tmp_path / "table.md"), rel=1e-4)


def test_a_model_card_s_table_is_of_the_evaluation(tmp_path):
    names = {
        "loss": "Training Loss",
        "epoch": "Epoch",
        "step": "Step",
        "grad_norm": "Validation Loss",
        "rewards/chosen": "Rewards/chosen",
        "rewards/rejected": "Rewards/rejected",
        "logps/chosen": "Logps/chosen",
    }
    (tmp_path / "README.md").write_text(
        "# My model\n\n### Training results\n\n" + table_of(names, " | ", frame=True)
    )
    log = read_log(tmp_path / "README.md")
    assert len(log.evaluation) == 30 and "rewards/chosen" not in log.train
    assert "coupled_fall" in {finding.rule for finding in examine(log).findings}


def european(value, decimals=6):
    """1234.5 as 1.234,500000."""
    return f"{value:,.{decimals}f}".replace(",", " ").replace(".", ",").replace(" ", ".")


def spreadsheet(mark, number, encoding, step=str, head=""):
    names = [
        "step",
        "loss",
        "learning_rate",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
    ]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=mark)
    writer.writerow(names)
    for row in ROWS:
        writer.writerow([step(row["step"] * 100), *(number(row[name]) for name in names[1:])])
    return (head + text.getvalue()).encode(encoding)


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (spreadsheet(";", european, "utf-8-sig"), ".csv"),
        (spreadsheet(";", european, "cp1252", step=lambda step: european(step, 0)), ".csv"),
        (spreadsheet("\t", european, "utf-16"), ".tsv"),
        (spreadsheet("\t", repr, "utf-8"), ".csv"),
        (spreadsheet(",", european, "utf-8"), ".csv"),
        (spreadsheet(",", repr, "utf-8", step=lambda step: f"{step:,}"), ".csv"),
        (spreadsheet(",", repr, "utf-8", step=lambda step: f"{step}.0", head="sep=,\n"), ".csv"),
        (spreadsheet(";", lambda value: f"{value:.3f}".replace(".", ","), "utf-8"), ".csv"),
        (spreadsheet(",", lambda value: f"{value:.6f}".replace("-", "\u2212"), "utf-8"), ".csv"),
    ],
    ids=[
        "comma",
        "thousands",
        "utf-16 tabs",
        "tabs",
        "quoted comma",
        "thousands in English",
        "floats",
        "three digits",
        "minus",
    ],
)
def test_spreadsheets(tmp_path, content, suffix):
    file = tmp_path / f"table{suffix}"
    file.write_bytes(content)
    log = read_log(file)
    assert list(log.train.index) == [100 * row["step"] for row in ROWS]
    for name in ("rewards/chosen", "logps/chosen", "loss"):
        assert log.train[name].tolist() == pytest.approx([row[name] for row in ROWS], abs=1e-3), name


@pytest.mark.parametrize(
    ("cell", "comma", "expected"),
    [
        ("0,6931", True, "0.6931"),
        ("-1.234,5", True, "-1234.5"),
        ("4,8E-06", True, "4.8E-06"),
        ("1.000", True, "1000"),
        ("1 234,5", True, "1234.5"),
        ("1\u00a0234,5", True, "1234.5"),
        ("1,234.5", False, "1234.5"),
        ("1,234", False, "1234"),
        ("0.6931", False, "0.6931"),
        ("12.5%", False, "0.125"),
        ("12,5 %", True, "0.125"),
        ("1'234.5", False, "1234.5"),
        ("nan", False, "nan"),
        ("", False, ""),
        ("loss", True, "loss"),
        ("5/547", False, "5/547"),
        ("0.5", True, "0.5"),
    ],
)
def test_cells(cell, comma, expected):
    assert plain(cell, comma) == expected


def test_which_comma_a_table_has():
    assert has_decimal_comma(["0,5", "10"]) and not has_decimal_comma(["0.5", "1,234"])
    assert has_decimal_comma(["0,693", "-0,120"]) and not has_decimal_comma(["1,234", "12,345"])
    assert has_decimal_comma(["10"], otherwise=True) and not has_decimal_comma(["10"])


def test_a_table_with_groups_over_its_names(tmp_path):
    """As a pivot or pandas' two rows of column names leave it."""
    lines = [
        "step,loss,rewards,,",
        ",,chosen,rejected,margins",
        *(
            f"{r['step']},{r['loss']},{r['rewards/chosen']},{r['rewards/rejected']},{r['rewards/margins']}"
            for r in ROWS
        ),
    ]
    (tmp_path / "grouped.csv").write_text("\n".join(lines))
    same(read_log(tmp_path / "grouped.csv"))
    lines[0] = "step,loss,rewards,rewards,rewards"
    (tmp_path / "grouped.csv").write_text("\n".join(lines))
    same(read_log(tmp_path / "grouped.csv"))


def test_a_wandb_chart_of_grouped_runs(tmp_path):
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
    header = ["train/global_step"]
    header += [f"Group: mine - train/{name}{end}" for name in names for end in ("", "__MIN", "__MAX")]
    lines = [",".join(f'"{name}"' for name in header)]
    lines += [
        ",".join(str(v) for v in (row["step"], *(row[n] for n in names for _ in range(3)))) for row in ROWS
    ]
    (tmp_path / "chart.csv").write_text("\n".join(lines))
    same(read_log(tmp_path / "chart.csv"))


def test_wandb_charts_of_one_run_in_a_folder_are_one_log(tmp_path):
    for number, name in enumerate(("rewards/chosen", "rewards/rejected", "rewards/margins")):
        lines = [f'"Step","sunny-1 - train/{name}","sunny-1 - train/{name}__MIN"']
        lines += [f'"{row["step"]}","{row[name]}","{row[name]}"' for row in ROWS]
        (tmp_path / f"wandb_export_{number}.csv").write_text("\n".join(lines))
    same(read_log(tmp_path))


def test_steps_that_are_missing_or_nan(tmp_path):
    """Wandb's history: rows of the system have no training step, and evaluations may say only wandb's own."""
    lines = [
        "_step,train/global_step,train/rewards/chosen,train/rewards/rejected,eval/rewards/chosen,system/gpu"
    ]
    for place, row in enumerate(ROWS):
        lines.append(f"{3 * place},{row['step']},{row['rewards/chosen']},{row['rewards/rejected']},,")
        lines.append(f"{3 * place + 1},NaN,NaN,NaN,NaN,88")
        lines.append(f"{3 * place + 2},NaN,NaN,NaN,-0.5,NaN")
    (tmp_path / "history.csv").write_text("\n".join(lines))
    log = read_log(tmp_path / "history.csv")
    same(log)
    assert list(log.evaluation.index) == list(log.train.index) and log.not_finite == ()


def test_a_workbook(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    names = ["step", "rewards/chosen", "rewards/rejected", "rewards/margins"]
    for row in [names, *([row[name] for name in names] for row in ROWS)]:
        book.active.append(row)
    book.save(tmp_path / "book.xlsx")
    same(read_log(tmp_path / "book.xlsx"))


def test_a_workbook_without_its_library_is_refused_with_the_way_out(tmp_path, monkeypatch):
    import pandas as pd

    def missing(*_, **__):
        raise ImportError("openpyxl")

    monkeypatch.setattr(pd, "read_excel", missing)
    (tmp_path / "book.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match="save the sheet as CSV"):
        read_log(tmp_path / "book.xlsx")


def test_a_last_line_that_was_cut_off(tmp_path):
    file = write_lines(tmp_path / "log.jsonl", ROWS)
    file.write_text(file.read_text() + '{"loss": 0.4, "ste')
    log = read_log(file)
    same(log)
    assert "cut off" in log.notes[0]


def test_an_object_per_line_under_another_name(tmp_path):
    same(read_log(write_lines(tmp_path / "log.json", ROWS)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("all_results.json", {"train_loss": 0.5, "epoch": 1.0}, "one set of numbers"),
        ("completions.jsonl", {"prompt": "a", "completion": "b", "reward": 1.0, "step": 3}, "holds texts"),
    ],
)
def test_what_is_no_log_but_often_given(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_text(json.dumps(content))
    assert main(["doctor", str(tmp_path / name)]) == 2
    assert words in capsys.readouterr().err


def test_a_file_without_rewards_names_the_one_beside_it(tmp_path, capsys):
    lines = ["step,loss,grad_norm", *(f"{row['step']},{row['loss']},{row['grad_norm']}" for row in ROWS)]
    (tmp_path / "loss.csv").write_text("\n".join(lines))
    assert main(["doctor", str(tmp_path / "loss.csv")]) == 2
    assert "Give the trainer_state.json" in capsys.readouterr().err
    state = write_state(tmp_path, ROWS)
    assert main(["doctor", str(tmp_path / "loss.csv")]) == 2
    assert f"entangle doctor {state}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        '{"log_history": [{"step": 1e999, "rewards/chosen": 1}]}',
        '{"log_history": [{"step": "NaN", "rewards/chosen": 1}]}',
        '{"log_history": [{"step": -5, "rewards/chosen": [1]}]}',
        '{"log_history": [[1], null, {"rewards/chosen": {"a": {}}}]}',
        "[" * 100_000,
        '{"log_history": "all"}',
        "\0\0\0",
        "",
    ],
)
def test_no_content_makes_a_traceback(tmp_path, capsys, content):
    for name in (
        "trainer_state.json",
        "log.jsonl",
        "log.csv",
        "train.log",
        "a.db",
        "log.md",
        "events.out.tfevents.1",
    ):
        (tmp_path / name).write_text(content)
        assert main(["doctor", str(tmp_path / name)]) == 2, name
        assert "Traceback" not in capsys.readouterr().err
        (tmp_path / name).unlink()


def test_every_reader_is_tried_by_name(tmp_path):
    assert Path(tmp_path).is_dir()
    with pytest.raises(DataError, match="Expected a .json"):
        (tmp_path / "model.safetensors").write_bytes(b"12345678")
        read_log(tmp_path / "model.safetensors")
