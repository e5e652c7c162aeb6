"""The documentation's pictures show what the page has, and its site works from the file system, without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from experiments.probe.pictures import PICTURES, make, photograph
from tests.report.browser import browser, complaints, until

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 200_000
"""Bytes of a picture."""


@pytest.mark.slow
def test_every_picture_of_the_documentation_can_be_made_anew(tmp_path):
    with browser():
        pass  # skips where there is none, before anything is probed
    make(tmp_path, "--limit", "26")  # the last of these is the one whose chosen log-prob falls
    made = {file.name for file in tmp_path.iterdir()}
    assert made == {*PICTURES, "plane.png"}
    assert made <= {file.name for file in (ROOT / "docs").glob("*.png")}, (
        "python -m experiments.probe.pictures docs"
    )
    for file in (*tmp_path.iterdir(), *(ROOT / "docs").glob("*.png")):
        assert file.stat().st_size < LARGEST, file


def test_a_picture_of_what_the_page_no_longer_has_is_an_error(opened, tmp_path):
    opened.get("about:blank")
    with pytest.raises(LookupError, match="the page has no"):
        photograph(opened, PICTURES["reading-plane.png"], tmp_path / "reading-plane.png")


def test_every_number_of_a_picture_is_explained_below_it():
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    explained = {
        file: len(re.findall(r"^\d+\. ", below, re.M))
        for file, below in re.findall(r"^!\[.*?\]\((.*?)\)\n\n((?:(?:\d+\.|   ).*\n)*)", text, re.M)
    }
    assert explained == {file: len(picture.marks) for file, picture in PICTURES.items() if picture.marks}


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site without the pages of the API, which take most of the time."""
    folder = tmp_path_factory.mktemp("site")
    built = load_config(
        str(ROOT / "mkdocs.yml"), site_dir=str(folder), plugins=["search", "offline"], strict=False
    )
    build(built)
    return folder


def test_search_works_from_the_file_system(opened, site):
    opened.get(f"file://{site}/index.html")
    query = "[data-md-component=search-query]"
    opened.execute_script(f"document.querySelector('{query}').focus()")
    opened.find_element("css selector", query).send_keys("bitsandbytes")
    until(opened, "return document.querySelector('.md-search-result__link')?.href.includes('.html')", 20)
    assert complaints(opened) == []


def test_no_page_of_the_site_fetches_anything_from_elsewhere(site):
    fetched = re.compile(r"<(?:script|img|iframe|link rel=.?stylesheet)[^>]+(?:src|href)=.?(?:https?:)?//")
    assert [
        page.name for page in site.rglob("*.html") if fetched.search(page.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize("width", [1400, 390])
def test_the_list_of_losses_fits_the_screen(opened, site, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.get(f"file://{site}/losses.html")
    parts = "return [...document.querySelectorAll('.loss, .loss *')]"
    beyond = f"{parts}.filter(part => part.getBoundingClientRect().right > innerWidth).length"
    assert opened.execute_script("return document.querySelectorAll('.loss').length") > 60
    assert opened.execute_script(beyond) == 0
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")
