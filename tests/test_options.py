"""Options: typed at the boundary, recorded so that they replay, and read from other trainers' files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from entangle.cli import COMMANDS
from entangle.config import (
    ModelOptions,
    ProbeConfig,
    RftConfig,
    SweepConfig,
    TrainConfig,
    WhatIfConfig,
    build_losses,
    parse,
    read_yaml,
)
from entangle.config.declared import declared_losses, script_fields, trainer_fields
from entangle.config.foreign import NO_LIMIT, training_keys
from entangle.config.specs import construct, parse_spec, spec_text, to_spec
from entangle.config.typed import types_of
from entangle.errors import ConfigError
from entangle.runs.folder import RunFolder
from losses import CATALOGUE, DPO, Hinge, SimPO, WithSFT

OWN_LOSS = '''
from typing import ClassVar

import torch

from losses import PairLogps, PreferenceLoss, register


@register
class CubicHinge(PreferenceLoss):
    """Cubic hinge: max(0, 1 - beta D)^3."""

    name: ClassVar = "{name}"
    paper: ClassVar = "none"
    ratio: ClassVar = "1"
    beta: float = 0.1

    def per_pair(self, logps: PairLogps) -> torch.Tensor:
        """Loss of each pair."""
        return (1 - self.beta * logps.logratio_margin).clamp(min=0) ** 3
'''


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


# --- types -------------------------------------------------------------------------------------------------


WRONG = [
    ({"limit": "four"}, "limit: expected a whole number, or nothing; got 'four'"),
    ({"limit": [1]}, r"limit: expected a whole number, or nothing; got a list, \[1\]"),
    ({"use_peft": "maybe"}, "use_peft: expected true or false; got 'maybe'"),
    ({"losses": None}, r"losses: expected losses, .*; got nothing \(null\)"),
    ({"losses": [3]}, "losses: expected losses, .*; got 3"),
    ({"losses": {"beta": 0.1}}, "losses: expected losses, .*; got a mapping"),
    ({"dtype": "fp32"}, "dtype: expected one of float32, float64, bfloat16, float16; got 'fp32'"),
    ({"reference": "adapter"}, "reference: expected one of auto, .*; got 'adapter'"),
    ({"model_name_or_path": 3}, "model_name_or_path: expected text; got 3"),
    ({"columns": [{"a": 1}, 3]}, "columns: expected settings, each key=value.*; got a list"),
    ({"shard_size": 0}, "shard_size must be at least 1; got 0"),
    ({"seed": -1}, "seed must be at least 0; got -1"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_is_of_the_wrong_kind_names_key_expected_and_got(given, message, tmp_path):
    """From Python and from a file, which is named."""
    with pytest.raises(ConfigError, match=message):
        ProbeConfig(**given)
    file = write(tmp_path / "x.yaml", given)
    with pytest.raises(ConfigError, match=f"x.yaml: {message}"):
        parse(ProbeConfig, ["--config", str(file)], prog="x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dpo:beta=abc", "loss dpo: beta: expected a number; got 'abc'"),
        ("dpo:beta=[1]", "loss dpo: beta: expected a number; got a list"),
        ({"name": "with_sft", "loss": "dpo:beta=abc"}, "loss dpo: beta: expected a number"),
        ({"name": "with_sft", "loss": 3}, "Expected a loss as name"),
        ("sigmoid", "Unknown loss 'sigmoid'. TRL's sigmoid is dpo here"),
        ("dpo:beta", "given as name or name:key=value"),
        ("no_such_module:Loss", "Can't find the loss 'no_such_module:Loss': ModuleNotFoundError"),
        ("losses:PairLogps", "to be a class derived from losses.PreferenceLoss"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_losses([spec])


def test_every_value_of_an_option_has_its_type():
    for command in COMMANDS.values():
        cls = command.config
        assert set(types_of(cls)) == {field.name for field in fields(cls)}, command.name
        assert cls() == cls(**{field.name: getattr(cls(), field.name) for field in fields(cls)})
    assert TrainConfig(learning_rate="1e-5", lora_target_modules="q_proj") == TrainConfig(  # pyright: ignore
        learning_rate=1e-5, lora_target_modules=("q_proj",)
    )
    with pytest.raises(ConfigError, match="learning_rate must be at least 0; got -1"):
        TrainConfig(learning_rate=-1)
    assert ModelOptions(Path("a") / "b").model_name_or_path == "a/b"  # pyright: ignore


# --- specs -------------------------------------------------------------------------------------------------


def test_a_spec_is_what_was_typed():
    for text in ("dpo", "dpop:penalty=5,beta=0.2", "with_sft:loss=simpo,alpha=2", "my.module:Loss:beta=0.2"):
        spec = parse_spec(text)
        assert spec_text(spec) == text and to_spec(spec) == spec and to_spec(text) == spec
    assert parse_spec('weighted_sum:losses=["dpo","sft"],weights=[1,2]') == {
        "name": "weighted_sum",
        "losses": ["dpo", "sft"],
        "weights": [1, 2],
    }
    assert parse_spec('{"name": "dpo", "beta": 0.3}') == {"name": "dpo", "beta": 0.3}


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_loss_is_built_back_from_its_spec(name):
    loss = CATALOGUE[name]()
    assert build_losses([to_spec(loss)]) == [loss] == build_losses([name])


def test_losses_given_as_objects_are_recorded_with_name_and_fields(tmp_path):
    """Two losses with the same fields are two runs, and each run's file gives its loss back."""
    given = [(DPO(),), (Hinge(),), (DPO(beta=0.2),), (WithSFT(SimPO(gamma=1.0), alpha=2.0), "dpo")]
    configs = [ProbeConfig(losses=losses) for losses in given]
    assert (
        len({config.run_path for config in configs}) == len({str(config.recorded) for config in configs}) == 4
    )
    for number, (losses, config) in enumerate(zip(given, configs, strict=True)):
        run = RunFolder(tmp_path / str(number))
        run.begin(config, {"data": "x"})
        again, notes = parse(ProbeConfig, ["--config", str(run.path / "config.yaml")], prog="x")
        assert not notes and not run.changed_options(again) and again.run_path == config.run_path
        assert build_losses(again.losses) == build_losses(losses)
    with pytest.raises(Exception, match="holds another run"):
        RunFolder(tmp_path / "0").begin(configs[1], {"data": "x"})
    train = TrainConfig(loss=DPO(beta=0.3))
    assert (
        train.loss == {"name": "dpo", "beta": 0.3}
        and train.run_path != TrainConfig(loss=Hinge(beta=0.3)).run_path
    )


def test_a_loss_of_the_users_own_replays_from_its_record(tmp_path, monkeypatch):
    """Registered in a module of the working folder, given as an object, a name or module:Class: one record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write(tmp_path / "my_own_losses.py", OWN_LOSS.format(name="cubic_hinge_a"))
    try:
        (loss,) = build_losses(["my_own_losses:CubicHinge:beta=0.2"])
        spec = {"name": "my_own_losses:CubicHinge", "beta": 0.2}
        assert to_spec(loss) == spec and loss.label == "cubic_hinge_a(beta=0.2)"
        assert ProbeConfig(losses=(loss,)) == ProbeConfig(losses=("my_own_losses:CubicHinge:beta=0.2",))
        assert to_spec({"name": "cubic_hinge_a", "beta": 0.2}) == spec
        whole = to_spec(WithSFT(loss))
        assert isinstance(whole, dict) and whole["loss"] == spec
        assert build_losses([to_spec(WithSFT(loss))]) == [WithSFT(loss)]
    finally:
        CATALOGUE.pop("cubic_hinge_a", None)
        sys.modules.pop("my_own_losses", None)


def test_a_loss_of_the_users_own_is_probed_by_the_command_line(tmp_path):
    """In a process of its own, as a user runs it: said that code is run, judged, recorded, replayed."""
    write(tmp_path / "my_losses.py", OWN_LOSS.format(name="cubic_hinge"))
    command = [sys.executable, "-m", "entangle", "probe", "--limit", "2", "--output_dir", "run"]
    run = subprocess.run(
        [*command, "--losses", "my_losses:CubicHinge", "dpo"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "Code of your own is run: my_losses:CubicHinge" in run.stderr and "cubic_hinge" in run.stdout
    again = [*command[:4], "--config", "run/config.yaml", "--output_dir", "run"]
    replayed = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True)
    assert replayed.returncode == 0 and "holds this run already" in replayed.stderr


def test_an_unknown_class_is_no_mitigation():
    from entangle.analysis.mitigations import MITIGATIONS, Mitigation

    with pytest.raises(ConfigError, match="Unknown mitigation 'hope'. Known mitigations: drift_free"):
        construct("hope", MITIGATIONS, Mitigation, "mitigation")


# --- files of other trainers -------------------------------------------------------------------------------


def test_what_classes_declare_is_read_from_their_source():
    """The same names as the imported classes have."""
    from trl import DPOConfig, SFTConfig  # pyright: ignore[reportPrivateImportUsage]
    from trl.scripts.utils import ScriptArguments
    from trl.trainer.model_config import ModelConfig

    assert declared_losses() == {
        name: cls.trl for name, cls in CATALOGUE.items() if "losses" in cls.__module__
    }
    assert {f.name for cls in (DPOConfig, SFTConfig) for f in fields(cls)} <= trainer_fields()
    assert {f.name for cls in (ModelConfig, ScriptArguments) for f in fields(cls)} <= script_fields()


TRL = {
    "model_name_or_path": "x/y",
    "dataset_name": "x/z",
    "beta": 0.05,
    "learning_rate": 1e-6,
    "output_dir": "trained",
    "use_peft": True,
    "lora_r": 4,
}


def test_a_training_files_loss_is_judged_and_its_folder_left_alone(tmp_path):
    """With beta alone it is TRL's default, the sigmoid loss; the note says what is judged."""
    file = write(tmp_path / "dpo.yaml", TRL)
    config, notes = parse(ProbeConfig, ["--config", str(file)], prog="x")
    assert config.losses == ({"name": "dpo", "beta": 0.05},) and config.output_dir is None
    assert any("Judged is the loss that the file trains with: dpo:beta=0.05" in note for note in notes)
    assert any("output_dir: trained is the training's own folder" in note for note in notes)
    assert any("learning_rate" in note for note in notes)
    what_if, _ = parse(WhatIfConfig, ["run", "--config", str(file)], prog="x")
    assert what_if.losses == config.losses and what_if.output_dir is None
    sweep, _ = parse(SweepConfig, ["--config", str(file)], prog="x")
    assert sweep.run == "trained" and sweep.run_path == Path("trained/sweep")
    rft, _ = parse(RftConfig, ["--config", str(file), "--output_dir", "own"], prog="x")
    assert rft.run_path == Path("own")
    ours = write(tmp_path / "train.yaml", {"loss": "simpo:gamma=1", "live": True, "output_dir": "trained"})
    config, _ = parse(ProbeConfig, ["--config", str(ours)], prog="x")
    assert config.losses == ({"name": "simpo", "gamma": 1},) and config.output_dir is None
    own = write(tmp_path / "probe.yaml", {"output_dir": "own", "limit": 3})
    assert parse(ProbeConfig, ["--config", str(own)], prog="x")[0].run_path == Path("own")


def test_train_accepts_or_answers_every_key_of_trl(tmp_path):
    """Each key at TRL's own default, by itself: taken, passed on, or said to be left out; none is an error."""
    from peft import LoraConfig
    from trl import DPOConfig  # pyright: ignore[reportPrivateImportUsage]
    from trl.scripts.utils import ScriptArguments
    from trl.trainer.model_config import ModelConfig

    values = {}
    for cls in (DPOConfig, ModelConfig, ScriptArguments):
        values |= {f.name: f.default for f in fields(cls) if isinstance(f.default, str | int | float | bool)}
    peft = {
        "r": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
    }
    assert {"r", "bias", "target_modules"} <= {f.name for f in fields(LoraConfig)}
    for key, value in (values | peft).items():
        found = read_yaml(write(tmp_path / "one.yaml", {key: value}), TrainConfig)
        assert not found.ignored, key
        TrainConfig(**found.values)
    assert len(values) > 100 and set(values) <= set(training_keys()) | set(types_of(TrainConfig))


@pytest.mark.parametrize(
    ("given", "expected", "note"),
    [
        ({"save_strategy": "no"}, {"save_steps": 0}, ""),
        ({"save_strategy": False}, {"save_steps": 0}, ""),
        ({"save_strategy": "epoch"}, {"save_steps": 500}, "every save_steps optimiser steps"),
        ({"use_cpu": True}, {"device": "cpu"}, ""),
        ({"lora_dropout": 0.1}, {"lora_r": 16}, "lora_dropout is left out: TRL switches dropout off"),
        ({"dtype": "auto"}, {"dtype": "float32"}, "dtype: auto is read as float32"),
        ({"max_length": None}, {"max_length": NO_LIMIT}, "no limit"),
        ({"r": 4, "target_modules": ["q_proj"]}, {"lora_r": 4, "lora_target_modules": ("q_proj",)}, ""),
        ({"pref_loss": "simpo", "pref_beta": 0.2}, {"loss": {"name": "simpo", "beta": 0.2}}, ""),
        ({"stage": "dpo"}, {"stage": "preference"}, ""),
        ({"adam_epsilon": 1e-6}, {"trainer_options": ("adam_epsilon=1e-06",)}, ""),
    ],
)
def test_keys_that_mean_the_same_are_taken(given, expected, note, tmp_path):
    found = read_yaml(write(tmp_path / "x.yaml", given), TrainConfig)
    config = TrainConfig(**found.values)
    assert {name: getattr(config, name) for name in expected} == expected
    assert note in " ".join(found.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_dora": True}, "use_dora would change the training"),
        ({"bias": "all"}, "bias: all would change the training"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: fp4"),
        ({"model_init_kwargs": {"dtype": "auto"}}, "model_init_kwargs"),
        ({"loss_type": "sigmod"}, "loss_type 'sigmod' isn't known"),
        (
            {"base_model": "x", "adapter": "lora", "rl": "dpo", "sequence_len": 5, "datasets": []},
            r"'adapter' \(here: use_peft: true\), 'base_model' \(here: model_name_or_path\), 'datasets' \(here: "
            r"dataset_name\), 'rl' \(here: loss\), 'sequence_len' \(here: max_length\)",
        ),
        ({"dataset_mixer": {}, "max_prompt_length": 3}, "'dataset_mixer' .*'max_prompt_length'"),
        ({"finetuning_type": "lora", "lora_target": "all"}, "use_peft.*lora_target_modules"),
    ],
)
def test_keys_that_would_change_a_training_are_refused_by_name(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path / "x.yaml", given), TrainConfig)


# --- the terminal ------------------------------------------------------------------------------------------


TYPOS = [
    (["probe", "--losses", "sigmoid"], "TRL's sigmoid is dpo here"),
    (["losses", "sigmoid"], "TRL's sigmoid is dpo here"),
    (["train", "--loss", "dop"], "Did you mean dpop"),
    (["probe", "--dataset_name", "nothing.jsonl"], "there is none (working folder"),
    (["sweep", "x", "--model_name_or_path", "./nowhere"], "Expected a folder with a model"),
    (["rft", "--rollouts", "nothing.jsonl"], "there is none"),
    (["whatif", "nowhere"], "Expected a run folder (with config.yaml) at nowhere"),
    (["tokens"], "expected the run folder of a finished probe: entangle tokens RUN. Got none."),
    (["probe", "typo.yaml"], "unknown key 'betaa'"),
    (["probe", "loss.yaml"], "loss_type 'sigmod' isn't known"),
    (["probe", "--bettas", "1"], "--bettas"),
]


def test_typos_are_answered_before_torch_is_imported(tmp_path):
    """All in one process: not one of them needs torch, transformers or TRL."""
    write(tmp_path / "typo.yaml", {"betaa": 0.1, "learning_rate": 1e-5})
    write(tmp_path / "loss.yaml", {"loss_type": "sigmod"})
    program = (
        "import sys\nfrom entangle.cli import main\n"
        f"for arguments, _ in {TYPOS!r}:\n"
        "    try:\n        status = main(arguments)\n"
        "    except SystemExit as exit_:\n        status = exit_.code\n"
        "    heavy = {'torch', 'transformers', 'trl', 'pandas'} & set(sys.modules)\n"
        "    assert status == 2 and not heavy, (arguments, status, heavy)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for _, message in TYPOS:
        assert message in run.stderr


def test_a_terminal_that_knows_ascii_only_is_no_error():
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "", "COLUMNS": "60"}
    for arguments in (
        ["losses", "dpo"],
        ["losses", "--family", "margin"],
        ["doctor", "--list_rules"],
        ["--help"],
    ):
        run = subprocess.run(
            [sys.executable, "-m", "entangle", *arguments], capture_output=True, env=environment
        )
        assert run.returncode == 0 and b"Traceback" not in run.stderr, run.stderr
        assert run.stdout.decode("ascii")


def test_a_reader_that_goes_away_is_no_error():
    for arguments in ("losses", "losses dpo", "losses --markdown", "--help"):
        command = f"{sys.executable} -m entangle {arguments}"
        with subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait() == 141, arguments


def test_the_first_interrupt_says_what_it_waits_for_and_the_second_stops(capsys):
    import signal

    from entangle.runs.progress import deferred_interrupt

    with pytest.raises(KeyboardInterrupt), deferred_interrupt("this shard") as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert (
            interrupted()
            and "Stopping once this shard is finished. Ctrl-C again stops" in capsys.readouterr().err
        )
        signal.raise_signal(signal.SIGINT)
