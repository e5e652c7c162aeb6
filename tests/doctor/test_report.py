"""What the command prints: how many rules could be asked, the run's own model, and nothing that steers a terminal."""

from __future__ import annotations

import json
import shlex

import pytest

from entangle.cli import main
from entangle.doctor import Origin, examine, read_log
from entangle.doctor.sources.beside import origin
from entangle.errors import DataError
from tests.doctor.made import groups, log_of, pairs, report_of, write_lines, write_state


def shown_for(file, capsys, *words):
    status = main(["doctor", str(file), *words])
    return status, " ".join(capsys.readouterr().out.split())


def kept(rows, *names):
    return [{name: row[name] for name in ("step", *names)} for row in rows]


def test_rules_that_can_t_be_asked_are_counted_and_named(tmp_path, capsys):
    file = write_lines(tmp_path / "log.jsonl", kept(pairs(), "rewards/chosen", "loss"))
    status, shown = shown_for(file, capsys)
    assert status == 0 and "No warning from the 3 of 11 rules that could be asked." in shown
    assert "coupled_fall, coupled_rise, rise_then_fall, start_off_reference (needs rewards/rejected)" in shown
    assert "no_margin, overshoot (needs rewards/margins)" in shown and "Drift can't be told" in shown
    _, content = shown_for(file, capsys, "--json")
    assert json.loads(content)["unasked"]["coupled_fall"] == ["rewards/rejected"]


def test_the_third_of_chosen_rejected_and_margin_is_worked_out():
    whole = {finding.rule: finding for finding in report_of(pairs(chosen=-1.0, rejected=-2.0)).findings}
    for left in (
        ("rewards/chosen", "rewards/margins"),
        ("rewards/rejected", "rewards/margins"),
        ("rewards/chosen", "rewards/rejected"),
    ):
        report = report_of(kept(pairs(chosen=-1.0, rejected=-2.0), *left))
        assert "coupled_fall" not in report.unasked
        (found,) = report.findings
        assert found.numbers == pytest.approx(whole["coupled_fall"].numbers)


def test_a_rule_that_was_named_and_can_t_be_asked_is_refused():
    log = log_of(kept(pairs(), "rewards/chosen"))
    with pytest.raises(DataError, match="coupled_fall needs rewards/rejected"):
        examine(log, ["coupled_fall"])


def test_a_beside_file_that_has_the_missing_side_is_named(tmp_path, capsys):
    file = write_lines(tmp_path / "some.jsonl", kept(pairs(), "rewards/chosen", "loss"))
    state = write_state(tmp_path / "checkpoint-1", pairs())
    assert f"{state} beside it has the rewards that this log lacks" in shown_for(file, capsys)[1]


def test_the_commands_name_the_run_s_own_model(tmp_path, capsys):
    state = write_state(tmp_path / "my run" / "checkpoint-5", pairs(chosen=-1.0, rejected=-2.0))
    base, folder = {"base_model_name_or_path": "org/base"}, state.parent
    assert "MODEL" in shown_for(state, capsys)[1]
    (tmp_path / "my run" / "README.md").write_text("---\nbase_model: org/base\ndatasets:\n- org/pairs\n---\n")
    assert "--model_name_or_path org/base --dataset_name org/pairs, then" in shown_for(state, capsys)[1]
    (folder / "adapter_config.json").write_text(json.dumps(base))
    expected = (
        f"entangle probe --model_name_or_path org/base --adapter_name_or_path {shlex.quote(str(folder))}"
    )
    assert expected in shown_for(tmp_path / "my run", capsys)[1]
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert origin(folder).model == f"--model_name_or_path {shlex.quote(str(folder))}"


@pytest.mark.parametrize("content", ["{", "[]", '{"base_model_name_or_path": 5}', ""])
def test_a_broken_config_beside_the_log_names_nothing(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "config.yaml").write_text("a: [")
    assert origin(tmp_path) == Origin()


def test_groups_name_their_model_too():
    report = report_of(
        [row | {"frac_reward_zero_std": 0.9} for row in groups()],
        origin=Origin(model="--model_name_or_path m", data="d"),
    )
    assert "entangle rft --model_name_or_path m --dataset_name d" in report.rule("dead_groups").ask


EVIL = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]\x9b31m\x85\u202e" + "y" * 5000


def test_names_and_values_from_a_log_steer_nothing(tmp_path, capfd):
    """Metric names, evaluation sets, models and paths with escapes, bells, C1 bytes, markup and great length."""
    place = tmp_path / f"r{EVIL[:20]}".replace("/", "_")
    rows = [
        row | {f"eval_{EVIL}_rewards/chosen": -1.0, EVIL: float("nan")}
        for row in pairs(chosen=-1.0, rejected=-2.0)
    ]
    rows += [{"step": 300, f"eval_{EVIL}b_rewards/chosen": -1.0}]
    state = write_state(place, rows)
    (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": EVIL}))
    main(["doctor", str(state)])
    main(["doctor", str(state), "--json"])
    main(["doctor", str(write_lines(tmp_path / "bad.jsonl", [{"step": 1, EVIL: 2.0}]))])
    main(
        [
            "doctor",
            str(write_lines(tmp_path / "worse.jsonl", [{"step": 1, EVIL: 2.0, "rewards/chosen": 1.0}])),
            "--rules",
            EVIL,
        ]
    )
    main(["doctor", str(tmp_path / EVIL[:30])])
    table = f'step,"{EVIL} - reward","b - reward"\n1,2,3\n'
    (tmp_path / "two.csv").write_text(table)
    main(["doctor", str(tmp_path / "two.csv")])
    for stream in capfd.readouterr():
        text = stream.replace("\n", "")
        assert not [char for char in text if ord(char) < 32 or 127 <= ord(char) < 160 or char == "\u202e"]
        assert max(map(len, stream.split("\n")), default=0) < 25_000
    assert read_log(state).metrics


def test_the_written_data_are_as_they_were(tmp_path):
    """Escapes are for showing alone: the log itself keeps its names."""
    log = read_log(write_state(tmp_path, [row | {"a\x1bb": 1.0} for row in pairs()]))
    assert "a\x1bb" in log.metrics
