"""The documentation says what the program does: pages, options, commands and notebooks."""

from __future__ import annotations

import ast
import copy
import importlib
import importlib.util
import inspect
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import entangle
from entangle.cli import COMMANDS, main
from entangle.config import parse
from losses import CATALOGUE, build

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
OPTIONS = re.compile(r"^\{\{ options (\w+) \}\}$", re.MULTILINE)


def options_of(verb: str) -> type:
    """The options class that a command's page names."""
    found = OPTIONS.search((ROOT / "docs" / "commands" / f"{verb}.md").read_text(encoding="utf-8"))
    assert found, f"docs/commands/{verb}.md names no options"
    assert found[1] == verb
    return COMMANDS[verb].config


def commands() -> list[str]:
    """Every `entangle VERB ...` that a page tells the reader to type, in a block or within a sentence."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    blocks = [
        block for text in texts for block in re.findall(r"^```(?:sh|text)\n(.*?)^```", text, re.M | re.S)
    ]
    lines = [
        line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [
        " ".join(said.split()) for text in texts for said in re.findall(r"`(entangle [a-z]+[^`]*)`", text)
    ]
    lines = [line.removeprefix("accelerate launch -m ") for line in lines]
    return sorted({line for line in lines if line.startswith("entangle ")})


def snippets(page: str) -> list[str]:
    return [code for language, _, code in examples(ROOT / "docs" / page) if language == "python"]


def examples(page: Path) -> list[tuple[str, str, str]]:
    """What a page shows to be run, in its order: language, name of the file that it is (or ""), text."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(sh|python)(?: title=\"(.+?)\")?\n(.*?)^```", text, re.M | re.S)


def name(page: Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


START = ROOT / "docs" / "index.md"
APART = "api/index.md"
"""The page whose snippets are run one by one, below."""
RUN = [page for page in PAGES if examples(page) and name(page) not in (name(START), APART)]


def follow(page: Path) -> None:
    """Do in the working folder what a page says: save its files, type its commands, run its Python."""
    names: dict[str, Any] = {"__name__": "page"}
    for language, file, code in examples(page):
        if file:
            Path(file).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile(code, name(page), "exec"), names)
        else:
            for line in code.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has followed the start page."""
    folder = tmp_path_factory.mktemp("started")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        follow(START)
    return folder


@pytest.fixture
def own_loss() -> Iterator[None]:
    """The loss that a page registers is forgotten afterwards, and so is the folder that it was found in."""
    known, path = dict(CATALOGUE), list(sys.path)
    yield
    CATALOGUE.clear()
    CATALOGUE.update(known)
    sys.modules.pop("my_losses", None)
    sys.path[:] = path


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_has_a_page_in_the_navigation(verb):
    assert options_of(verb)
    assert f"commands/{verb}.md" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("command", commands())
def test_every_command_on_a_page_can_be_parsed(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo.yaml").write_text("beta: 0.1\n")
    (tmp_path / "train.yaml").write_text("max_steps: 1\n")
    (tmp_path / "compare.yaml").write_text("seeds: [0]\n")
    _, verb, *arguments = shlex.split(command)
    parse(options_of(verb), arguments, prog=f"entangle {verb}")


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name)
def test_every_example_of_a_page_runs(page, started, own_loss, tmp_path, monkeypatch):
    """In their order, in a folder of the page's own that begins as the start page leaves it."""
    shutil.copytree(started, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    follow(page)


def test_the_start_page_makes_the_run_that_the_others_take(started):
    assert (started / "runs/first/report.html").exists() and (started / "runs/first/tokens.parquet").exists()


@pytest.mark.usefixtures("own_loss")
def test_a_loss_of_the_readers_own_works_as_the_page_says():
    for snippet in snippets("losses.md"):
        exec(compile(snippet, "docs/losses.md", "exec"), {"__name__": __name__})
    assert build("cubic_hinge").config["beta"] == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(snippets("api/index.md"))))
def test_every_snippet_of_the_python_api_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    snippet = snippets("api/index.md")[number]
    exec(compile(snippet, f"docs/api/index.md, snippet {number}", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out and not list(tmp_path.iterdir())


def printed(notebook: Any) -> list[list[tuple[str, ...]]]:
    """What each cell of a notebook shows, but for digits, spaces and pictures: what every machine shows alike."""
    return [
        [
            (
                *sorted(output.get("data", ())),
                re.sub(r"[\d\s.-]+", " ", output.get("text", "") or plain(output)),
            )
            for output in cell.get("outputs", ())
            if output.get("name") != "stderr"  # progress
        ]
        for cell in notebook.cells
    ]


def plain(output: Any) -> str:
    return output.get("data", {}).get("text/plain", "").partition("Figure size")[0]


@pytest.mark.slow
def test_the_notebook_for_the_embedded_pairs_runs_and_holds_what_it_shows(tmp_path):
    kept = nbformat.read(ROOT / "docs" / "notebooks" / "embedded.ipynb", as_version=4)
    notebook = copy.deepcopy(kept)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "single_word" in shown and "image/png" in shown
    assert printed(kept) == printed(notebook)


def test_the_notebook_for_a_gpu_calls_what_there_is():
    """Its cells compile, name what the package has, and its calls of the package bind to their signatures."""
    cells = nbformat.read(ROOT / "docs" / "notebooks" / "tldr_gpu.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    shell = [line[1:] for line in code.splitlines() if line.startswith("!")]
    tree = ast.parse("\n".join(line for line in code.splitlines() if not line.startswith("!")))
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            known |= {name.name: getattr(module, name.name) for name in node.names}
    bound = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            names = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(known[node.func.id]).bind(*node.args, **names)
            bound += 1
    assert {"ProbeConfig", "run_probe", "what_if", "estimate"} <= set(known) and bound >= 4
    for line in shell:
        _, verb, *arguments = shlex.split(line)
        parse(options_of(verb), arguments, prog=f"entangle {verb}")


def test_notebooks_hold_no_path_of_a_machine():
    for file in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        assert not re.search(r"/(home|root|work|tmp|Users)/", file.read_text(encoding="utf-8")), file


def test_every_name_in_the_architecture_exists():
    """Dotted names can be imported, paths are there."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:entangle|tests|losses)[\w./]*)`", text))
    assert len(names) > 15
    for name in names:
        if "/" in name:
            assert (ROOT / name).exists(), name
            continue
        module, _, attribute = name.rpartition(".")
        if importlib.util.find_spec(name if not attribute[:1].isupper() else module) is None:
            raise AssertionError(name)
        if attribute[:1].isupper():
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_extra_is_named_on_the_start_page():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install = START.read_text(encoding="utf-8").partition("## Install")[2].partition("\n## ")[0]
    assert [extra for extra in extras if f"`{extra}`" not in install] == []


def test_every_public_name_has_an_entry_in_the_api_pages():
    texts = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md")]
    shown = {found for text in texts for found in re.findall(r"^::: (\S+)", text, re.M)}
    assert {f"entangle.{public}" for public in entangle.PUBLIC} - shown == set()
    modules = {f"losses.{file.stem}" for file in (ROOT / "losses").glob("*.py")} - {"losses.__init__"}
    assert {
        module for module in modules if getattr(importlib.import_module(module), "__all__", ())
    } - shown == set()
