"""Everything that the README tells a user to type, typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from entangle import ProbeConfig, cli, run_probe
from entangle.catalogue import markdown_table
from entangle.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [
    line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's commands run one after the other: a folder outside the checkout."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("entangle ")])
def test_every_command_runs(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_snippet_runs(number, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(blocks("python")[number], f"README, snippet {number}", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out or (folder / "runs").is_dir()


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_ci_calls_the_test_command_of_the_readme():
    assert "make test" in COMMANDS and (ROOT / ".ci/run").read_text().rstrip().endswith("make test")


def test_every_command_of_the_readme_is_known_or_shell():
    for command in COMMANDS:
        first, second = command.split()[:2]
        assert first == "make" or (first == "entangle" and second in cli.COMMANDS), command


def test_table_of_losses_is_current():
    assert markdown_table() in README, "put the output of `entangle losses --markdown` into the README"


def test_files_that_the_readme_links_to_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_first_picture_shows_as_many_pairs_as_the_text_says(folder):
    done = run_probe(ProbeConfig(losses=("dpo_shift:shift=0.9",), output_dir=str(folder / "picture")))
    assert f"{(done.predictions['regime'] == 'both_up').sum()} of these pairs" in README
    assert f"{100 / 0.9 - 100:.0f} % more weight on" in README
