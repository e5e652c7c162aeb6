"""The commands as a user types them: what they print, their exit status, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import entangle
from entangle import embedded
from entangle.cli import Command, main
from entangle.config import ProbeConfig, read_yaml
from entangle.errors import ConfigError
from entangle.version import __version__
from losses import CATALOGUE, build
from tests.tiny import gpt2_tokenizer, save_adapter, save_policy

GOOD = {"prompt": "TL;DR:", "chosen": " the cat sat", "rejected": " they thought"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("model") / "base", gpt2_tokenizer())


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], output: Path, *arguments: str) -> str:
    """The message of a command that must end with status 2 and leave no run folder."""
    try:
        status = main(["probe", *arguments, "--output_dir", str(output)])
    except SystemExit as exit_:  # what the parser of the flags refuses
        status = exit_.code
    message = capsys.readouterr().err
    assert status == 2, message
    assert not output.exists(), "something was half-written"
    assert "Traceback" not in message
    return " ".join(message.split())


BAD_DATA = {
    "missing file": (None, "Expected a file or folder at"),
    "missing column": (
        [{"prompt": "a", "better": " b", "rejected": " c"}],
        "its columns are: prompt, better, rejected",
    ),
    "malformed json": ([GOOD, '{"prompt": "a", "chosen'], "line 2"),
    "empty file": ([], "has no rows"),
    "empty prompt": ([GOOD | {"prompt": ""}], "Row 0"),
    "empty response": ([GOOD, GOOD | {"chosen": ""}], "Row 1"),
    "not a text": ([GOOD, GOOD | {"rejected": 5}], "Row 1"),
    "null": ([GOOD | {"chosen": None}], "Row 0"),
}


@pytest.mark.parametrize(("rows", "expected"), BAD_DATA.values(), ids=list(BAD_DATA))
def test_bad_data_is_refused_with_its_reason(base, tmp_path, capsys, rows, expected):
    data = tmp_path / "rows.jsonl"
    if rows is not None:
        write(data, *rows)
    message = refused(
        capsys,
        tmp_path / "run",
        "--model_name_or_path",
        base,
        "--dataset_name",
        str(data),
        "--reference",
        "self",
    )
    assert expected in message


def test_bad_models_are_refused_with_their_reason(base, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "run"
    data = ("--dataset_name", "embedded")
    nowhere, empty = str(tmp_path / "nowhere"), str(tmp_path / "empty")
    assert "Expected a folder" in refused(capsys, output, "--model_name_or_path", nowhere, *data)
    assert "config.json" in refused(capsys, output, "--model_name_or_path", empty, *data)
    other = save_policy(tmp_path / "other", gpt2_tokenizer(), hidden=32)
    adapter = save_adapter(tmp_path / "adapter", other, hidden=32)
    message = refused(capsys, output, "--model_name_or_path", base, "--adapter_name_or_path", adapter, *data)
    assert "adapter" in message and "base" in message


BAD_OPTIONS = {
    "unknown loss": (["--losses", "dop"], "Unknown loss 'dop'. Did you mean dpop? Known losses:"),
    "unknown hyper-parameter": (["--losses", "dpo:gamma=1"], "'gamma' of loss 'dpo'"),
    "nonsense hyper-parameter": (["--losses", "dpo:beta=-1"], "beta"),
    "malformed loss": (["--losses", "dpo:beta"], "name:key=value"),
    "malformed column": (["--columns", "chosen"], "ours=theirs"),
    "limit of nothing": (["--limit", "0"], "limit must be at least 1"),
    "no parameters": (["--parameters", "nothing_has_this_name"], "selects none"),
    "missing config": (["--config", "nowhere.yaml"], "Expected a YAML file"),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD_OPTIONS.values(), ids=list(BAD_OPTIONS))
def test_bad_options_are_refused_with_their_reason(base, tmp_path, capsys, arguments, expected):
    data = write(tmp_path / "rows.jsonl", GOOD)
    given = ["--model_name_or_path", base, "--dataset_name", data, "--reference", "self"]
    assert expected in refused(capsys, tmp_path / "run", *given, *arguments)


@pytest.mark.parametrize("verb", ["probe", "train", "compare", "rft", "joint"])
def test_a_word_where_options_belong_is_answered_with_the_options(verb, capsys):
    assert main([verb, "pairs.jsonl"]) == 2
    assert "got 'pairs.jsonl'. Data is named by --dataset_name" in " ".join(capsys.readouterr().err.split())


def test_flag_that_does_not_exist_exits_with_two(tmp_path):
    with pytest.raises(SystemExit) as exit_:
        main(["probe", "--bettas", "1"])
    assert exit_.value.code == 2


def test_unknown_command_names_the_known_ones(capsys):
    assert main(["prob"]) == 2
    assert "probe" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, arguments):
    assert main(arguments) == 0
    assert "probe" in capsys.readouterr().out


def test_yaml_of_trl_is_accepted_and_training_keys_are_named(base, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", GOOD)
    lines = [
        f"model_name_or_path: {base}",
        f"dataset_name: {data}",
        "use_peft: true",
        "lora_r: 2",
        "beta: 0.05",
        "loss_type: [sigmoid, hinge]",
        "learning_rate: 1.0e-6",
        "gradient_accumulation_steps: 8",
        "max_length: 64",
    ]
    config = write(tmp_path / "dpo.yaml", *lines)
    assert main(["probe", "--config", config, "--output_dir", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    ignored = " ".join(captured.err.split())
    assert "gradient_accumulation_steps, learning_rate" in ignored
    assert json.loads((tmp_path / "run/summary.json").read_text())["regimes"].keys() == {
        "weighted_sum(losses=(dpo(beta=0.05), hinge(beta=0.05)), weights=(1, 1))"
    }


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["loss_type: ipo", "beta: 0.2"], ({"name": "ipo_avg", "tau": 0.2},)),
        (["loss_type: [sigmoid]", "beta: 0.2"], ({"name": "dpo", "beta": 0.2},)),
        (
            ["loss_type: [sigmoid, sft]", "loss_weights: [1.0, 0.5]"],
            (
                {
                    "name": "weighted_sum",
                    "losses": ({"name": "dpo"}, {"name": "sft_batch"}),
                    "weights": (1.0, 0.5),
                },
            ),
        ),
    ],
)
def test_loss_type_of_trl_is_one_loss_with_trl_values(tmp_path, lines, expected):
    options = read_yaml(write(tmp_path / "dpo.yaml", *lines), ProbeConfig)
    assert options.values["losses"] == expected
    assert [build(spec).per_pair for spec in options.values["losses"]]


def test_losses_are_listed_filtered_and_explained(capsys):
    assert main(["losses"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in CATALOGUE)
    assert main(["losses", "--family", "divergence"]) == 0
    assert "f_dpo_js" in (filtered := capsys.readouterr().out) and "simpo" not in filtered
    assert main(["losses", "discopop"]) == 0
    explained = capsys.readouterr().out
    assert "trap" in explained and "2406.08414" in explained
    assert main(["losses", "dop"]) == 2
    assert "Unknown loss 'dop'" in capsys.readouterr().err


def test_typo_in_yaml_is_refused(base, tmp_path, capsys):
    config = write(tmp_path / "dpo.yaml", f"model_name_or_path: {base}", "betaa: 0.1")
    assert "unknown key 'betaa'" in refused(capsys, tmp_path / "run", "--config", config)


def test_markup_in_the_data_is_printed_as_text(base, tmp_path, capsys):
    rows = [GOOD | {"chosen": " [bold red]they[/] \x1b[31mcat", "kind": f"[link={i}]"} for i in range(2)]
    data = write(tmp_path / "rows.jsonl", *rows)
    arguments = [
        "--model_name_or_path",
        base,
        "--dataset_name",
        data,
        "--reference",
        "self",
        "--max_length",
        "64",
    ]
    assert main(["probe", *arguments, "--losses", "dpo", "--output_dir", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "[link=0]" in printed and "\x1b[31mcat" not in printed


def test_read_only_folder_is_reported(base, tmp_path, capsys, monkeypatch):
    """As root nothing is read-only, so the file system's refusal is what is simulated."""

    def refuse(self, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    data = write(tmp_path / "rows.jsonl", GOOD)
    given = ["--model_name_or_path", base, "--dataset_name", data, "--reference", "self"]
    assert "Read-only file system" in refused(capsys, tmp_path / "run", *given)


def test_full_disk_keeps_what_was_finished_and_leaves_no_torn_file(base, tmp_path, capsys, monkeypatch):
    import pandas as pd

    write_parquet = pd.DataFrame.to_parquet

    def full_disk(self, path, **options):
        if "00001" in str(path):
            Path(path).write_bytes(b"torn")
            raise OSError(28, "No space left on device")
        write_parquet(self, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full_disk)
    data = write(tmp_path / "rows.jsonl", *([GOOD] * 3))
    given = ["--model_name_or_path", base, "--dataset_name", data, "--reference", "self", "--shard_size", "1"]
    command = ["probe", *given, "--output_dir", str(tmp_path / "run")]
    assert main(command) == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "run/pairs").iterdir()) == ["00000.parquet"]
    monkeypatch.undo()
    assert main(command) == 0


def test_dry_run_says_what_would_be_computed_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["probe", "--dry_run"]) == 0
    assert "72 pairs, 72 to be scored" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_module_named_losses_beside_the_script_is_detected(tmp_path):
    (tmp_path / "losses.py").write_text("x = 1\n")
    (tmp_path / "script.py").write_text("import entangle\n")
    finished = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode != 0
    assert "shadows ours" in finished.stderr and str(tmp_path / "losses.py") in finished.stderr


@pytest.mark.slow
def test_embedded_default_runs_outside_the_checkout(tmp_path):
    """`entangle probe` without arguments, as `make demo` runs it: kinds differ as the theory says."""
    environment = os.environ | {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "entangle", "probe", "--verify", "3", "--losses", "dpo", "simpo", "cpo"]
    finished = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True
    )
    assert "72 embedded pairs, 72 scored" in finished.stdout
    run = next((tmp_path / "runs").iterdir())
    summary = json.loads((run / "summary.json").read_text())
    kinds = summary["groups"]["values"]
    assert kinds["single_word"]["regimes"]["dpo"]["ideal"]["share"] >= 0.75
    suffix, word = kinds["long_shared_suffix"], kinds["single_word"]
    assert suffix["cosine"] > 0.9 > 0.75 > word["cosine"]
    assert suffix["band"][1] - suffix["band"][0] < 0.2 < word["band"][1] - word["band"][0]
    assert summary["verification"]["all"]["sign_agreement"] >= 0.99
    assert 3.5 <= summary["verification"]["all"]["error_ratio"] <= 4.5


def test_embedded_files_ship_and_stay_small():
    folder = Path(embedded.__file__).parent
    files = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {"model.safetensors", "adapter_model.safetensors", "pairs.jsonl"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 10_000_000
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".pickle")]


def test_public_names_exist():
    for name in entangle.__all__:
        assert getattr(entangle, name) is not None


def test_an_error_of_our_own_is_never_taken_for_a_warning(monkeypatch, capsys):
    """Status 1 says that a threshold is broken: an uncaught error must not."""

    def broken(command, config, console):
        raise KeyError("gone\x1b[2J")

    monkeypatch.setattr(Command, "run", broken)
    assert main(["probe", "--group_by", "a\x1bb"]) == 70
    message = capsys.readouterr().err
    assert "Traceback" in message and "KeyError" in message and "an error of entangle itself" in message
    assert "entangle probe --group_by" in message and __version__ in message and "\x1b" not in message


def test_what_a_user_can_mend_keeps_its_status(monkeypatch, capsys):
    def broken(command, config, console):
        raise ConfigError("a\x1bb")

    monkeypatch.setattr(Command, "run", broken)
    assert main(["probe"]) == 2
    assert capsys.readouterr().err == "entangle probe: a\\x1bb\n"
