"""A real browser without a window or a network, for tests that open a page; skips with a reason where there is none."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1280,900",
)


@contextmanager
def browser() -> Iterator[Any]:
    """A browser of its own, with an empty profile that goes with it."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no browser: pages are tested where chromium and chromedriver are installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium isn't installed")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for switch in (*SWITCHES, f"--user-data-dir={profile}"):
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            yield opened
        finally:
            opened.quit()


def show(opened: Any, page: Path, fragment: str = "", timeout: float = 60.0) -> None:
    """Open a page from the file system and wait until everything on it is drawn."""
    opened.get("about:blank")  # a page already open would only be scrolled to the fragment
    opened.get(f"file://{page}{fragment}")
    until(opened, "return document.documentElement.dataset.ready === 'all'", timeout)


def until(opened: Any, script: str, timeout: float = 10.0) -> Any:
    """Wait until a script returns something true, and return it."""
    end = time.monotonic() + timeout
    while not (found := opened.execute_script(script)):
        assert time.monotonic() < end, f"waited {timeout} s for: {script}"
        time.sleep(0.05)
    return found


def complaints(opened: Any) -> list[str]:
    """What the page wrote to the console since the last time it was asked: errors, warnings, refusals."""
    return [entry["message"] for entry in opened.get_log("browser")]
