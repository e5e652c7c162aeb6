"""The wheel: it holds what it must, nothing else, and its command runs outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout isn't littered."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    names = [name for name in listed if name and (ROOT / name).is_file()]
    assert names, "the tests run in a checkout"
    for name in names:
        if not name.startswith(("tests/", "experiments/results/")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_packages_and_the_embedded_default(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"entangle", "losses"}
    for needed in (
        "entangle/py.typed",
        "losses/py.typed",
        "entangle/embedded/pairs.jsonl",
        "entangle/embedded/policy/README.md",
        "entangle/embedded/policy/model.safetensors",
        "entangle/embedded/policy/tokenizer.json",
        "entangle/embedded/adapter/adapter_model.safetensors",
        "entangle/embedded/adapter/adapter_config.json",
        "entangle/data/sources.py",
        "entangle/models/policy.py",
        "entangle/scores/factored.py",
    ):
        assert needed in names, needed
    assert any(name.endswith("LICENSE") for name in names)
    assert wheel.stat().st_size < 11_000_000


@pytest.mark.slow
def test_installed_command_runs_outside_the_checkout(wheel, tmp_path):
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    where = "import entangle, losses; print(entangle.__file__, losses.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert found.stdout.count(str(tmp_path / "site")) == 2, found.stderr
    command = [sys.executable, "-m", "entangle", "probe", "--limit", "4", "--losses", "dpo", "simpo"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0 and "4 embedded pairs, 4 scored" in finished.stdout, finished.stderr
