"""The page in a real browser: it draws without complaint, filters, sorts, follows links, turns dark, prints."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from entangle.analysis.wording import pair_sentence
from entangle.report.command import load_sources
from entangle.report.page import write_page
from entangle.report.source import Source
from tests.report.browser import browser, complaints, show, until
from tests.report.test_page import HOSTILE
from tests.run_folders import synthetic_pairs, synthetic_run

COUNT = 400
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Two runs; the first has hostile texts, a pair taken apart into tokens, and a column of its own."""
    folder = tmp_path_factory.mktemp("browser")
    pairs = synthetic_pairs(COUNT, norm_ratio=0.7).assign(
        kind=[f"kind {i % 3}" for i in range(COUNT)], extra=range(COUNT)
    )
    first = synthetic_run(folder / "one", pairs, losses=("dpo", "simpo", "sft"))
    words = pd.Series(range(COUNT)).astype(str)
    texts = pd.DataFrame(
        {
            "index": range(COUNT),
            "prompt": HOSTILE,
            "chosen": "good " + words,
            "rejected": "bad " + HOSTILE,
        }
    )
    first.write_table("texts.parquet", texts)
    tokens = pd.DataFrame(
        {
            "index": 7,
            "side": ["chosen"] * 2 + ["rejected"],
            "position": [0, 1, 0],
            "text": ["go", HOSTILE, " bad"],
            "share": [1.5, -0.5, 1.0],
            "logp": [-1.0, -2.0, -3.0],
        }
    )
    first.write_table("tokens.parquet", tokens)
    second = synthetic_run(folder / "two", synthetic_pairs(30, seed=1), losses=("dpo",))
    return load_sources([first.path, second.path])


@pytest.fixture(scope="module")
def page(sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(sources, tmp_path_factory.mktemp("pages") / "report.html")


@pytest.fixture
def shown(opened, page) -> Iterator[Any]:
    """The page, opened anew; whatever a test does on it, the console stays silent."""
    show(opened, page)
    yield opened
    assert complaints(opened) == []


def choose(driver: Any, name: str, value: str) -> None:
    """Give a control a value as a user does: with the events that follow."""
    driver.execute_script(
        "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
        "for (const e of ['input', 'change']) c.dispatchEvent(new Event(e, {bubbles: true}));",
        name,
        value,
    )


def corner(driver: Any, key: str) -> tuple[float, float]:
    """Where on the screen a live figure begins, scrolled into sight."""
    return driver.execute_script(
        "const f = document.getElementById('figure-' + arguments[0]); f.scrollIntoView({block: 'center'});"
        "const b = f.getBoundingClientRect(); return [b.left, b.top];",
        key,
    )


def point(driver: Any, key: str) -> tuple[int, float, float]:
    """The pair whose mark stands farthest left in a live figure, and where that is on the screen."""
    left, top = corner(driver, key)
    judged = driver.execute_script(
        "return JSON.parse(document.getElementById('content').textContent).runs[0].pairs"
    )
    ratios = judged["columns"]["norm_ratio"]
    place = ratios.index(min(ratios))
    marks = driver.execute_script(
        "return [...document.querySelectorAll('#figure-' + arguments[0] + ' .points path')].map(p => {"
        "  const s = p.getAttribute('d').split('M').slice(1).map(m => m.split(/[a-z]/i)[0].split(' ').map(Number));"
        "  return s.reduce((a, b) => (b[0] < a[0] ? b : a)); })",
        key,
    )
    x, y = min(marks)
    return place, left + x + 3, top + y


def mouse(driver: Any, *events: tuple) -> None:
    """Real events of the mouse: ("move", x, y), ("down",), ("up",), the last two where it was moved to."""
    at = (0.0, 0.0)
    for kind, *place in events:
        at = tuple(place) or at
        name = {"move": "mouseMoved", "down": "mousePressed", "up": "mouseReleased"}[kind]
        buttons = {} if kind == "move" else {"button": "left", "clickCount": 1}
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": name, "x": at[0], "y": at[1], **buttons})


def found(driver: Any) -> str:
    return driver.execute_script("return document.getElementById('found').textContent")


def rows(driver: Any, column: int) -> list[str]:
    return driver.execute_script(
        "return [...document.querySelectorAll('#body tr:not([aria-hidden])')]"
        ".map(r => r.children[arguments[0]].textContent)",
        column,
    )


def test_everything_is_drawn(shown):
    drawn = shown.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg').length)"
    )
    assert len(drawn) >= 8 and all(drawn)
    points = shown.execute_script(
        "return [...document.querySelectorAll('#figure-plane-0-0 .points path')]"
        ".map(p => p.getAttribute('d').match(/M/g).length)"
    )
    assert len(points) > 1 and sum(points) == COUNT  # a mark of its own for every pair, a path per regime


def test_data_renders_as_text(shown):
    """A hostile prompt is on the page, letter by letter, and made no element, dialog or request."""
    shown.execute_script("location.hash = '#pair-7'")
    until(shown, "return document.activeElement.id === 'pair-7'")
    assert shown.execute_script("return document.querySelector('#pair-7 .prompt').textContent") == HOSTILE
    assert (
        shown.execute_script("return document.querySelectorAll('#pair-7 .chosen mark')[1].textContent")
        == HOSTILE
    )
    assert shown.execute_script("return document.querySelectorAll('img, .card b, .card script').length") == 0
    assert shown.execute_script("return document.scripts.length") == 2


def test_only_rows_in_sight_are_in_the_document(shown):
    assert found(shown) == f"{COUNT} of {COUNT} pairs" and len(rows(shown, 0)) < 80
    shown.execute_script("const box = document.getElementById('rows'); box.scrollTop = box.scrollHeight")
    until(
        shown, f"return [...document.querySelectorAll('#body th')].some(c => c.textContent === '{COUNT - 1}')"
    )
    last = shown.execute_script(
        "return [...document.querySelectorAll('#body tr[aria-rowindex]')].at(-1).ariaRowIndex"
    )
    assert last == str(COUNT + 1)


def test_filters_keep_the_pairs_that_match(shown, sources):
    judged = sources[0].judged("dpo")
    choose(shown, "regime", "2")
    assert found(shown) == f"{(judged['regime'] == 'both_down').sum()} of {COUNT} pairs"
    choose(shown, "kind", "1")
    both = (judged["regime"] == "both_down") & (judged["kind"] == "kind 1")
    assert found(shown) == f"{both.sum()} of {COUNT} pairs" and 0 < both.sum()
    shown.execute_script("document.getElementById('filters').reset()")
    until(shown, f"return document.getElementById('found').textContent === '{COUNT} of {COUNT} pairs'")
    choose(shown, "words", "GOOD 39")
    assert rows(shown, 0) == ["39", *map(str, range(390, 400))]
    choose(shown, "words", "")
    choose(shown, "least", "0.95")
    assert found(shown) == f"{(judged['cosine'] >= 0.95).sum()} of {COUNT} pairs"


def test_heads_sort_and_say_so(shown, sources):
    head = "document.querySelector('[data-column=cosine]')"
    for direction, ascending in (("ascending", True), ("descending", False)):
        shown.execute_script(f"{head}.querySelector('button').click()")
        assert shown.execute_script(f"return {head}.ariaSort") == direction
        expected = (
            sources[0].pairs.sort_values("cosine", ascending=ascending)["index"].head(5).astype(str).tolist()
        )
        assert rows(shown, 0)[:5] == expected
    assert shown.execute_script("return document.querySelector('[data-column=index]').ariaSort") == "none"


def test_deep_link_opens_its_pair(opened, page, sources):
    show(opened, page, "#pair-123")
    assert opened.execute_script("return document.activeElement.id") == "pair-123"
    row = sources[0].judged("dpo").set_index("index", drop=False).loc[123].to_dict()
    assert (
        opened.execute_script("return document.querySelector('#pair-123 .chosen').textContent") == "good 123"
    )
    reason = opened.execute_script("return document.querySelector('#pair-123 .reason').textContent")
    assert reason.split(":")[0] == pair_sentence(row, row).split(":")[0]
    opened.execute_script("location.hash = '#run2-pair-5'")
    until(opened, "return document.activeElement.id === 'run2-pair-5'")
    assert opened.execute_script("return document.getElementById('run').value") == "1"
    opened.execute_script("location.hash = '#pair-9999'")
    until(opened, "return document.getElementById('selected').textContent.includes(\"isn't here\")")
    assert complaints(opened) == []


def test_point_of_the_plane_opens_its_pair(shown):
    """Hover says which pair is there, a click opens its card; the pair at the far left lies alone."""
    place, x, y = point(shown, "plane-0-0")
    mouse(shown, ("move", x, y))
    assert shown.execute_script(
        "return document.querySelector('#figure-plane-0-0 .tip').textContent"
    ).startswith(f"pair {place}: ")
    assert f"chosen: good {place} " in shown.execute_script(
        "return document.getElementById('beside-plane-0-0').textContent"
    )
    mouse(shown, ("move", x, y), ("down",), ("up",))
    until(shown, f"return document.activeElement.id === 'pair-{place}'")


def test_dragging_looks_closer_and_a_button_goes_back(shown):
    marks = (
        "return [...document.querySelectorAll('#figure-plane-0-0 text')].map(t => t.textContent).join('|')"
    )
    whole = shown.execute_script(marks)
    left, top = corner(shown, "plane-0-0")
    mouse(shown, ("move", left + 300, top + 150), ("down",), ("move", left + 400, top + 250), ("up",))
    assert shown.execute_script(marks) != whole
    choose(shown, "loss", "simpo")  # what is looked at stays
    assert shown.execute_script(marks) != whole
    shown.execute_script(
        "[...document.querySelectorAll('#tools-plane-0-0 button')].find(b => b.textContent === 'Whole view').click()"
    )
    assert shown.execute_script(marks) == whole


def test_keys_walk_through_the_plane(shown):
    from selenium.webdriver.common.keys import Keys

    shown.execute_script("document.getElementById('figure-plane-0-0').focus()")
    focused = shown.switch_to.active_element
    focused.send_keys(Keys.ARROW_RIGHT)
    first = shown.execute_script("return document.querySelector('#figure-plane-0-0 .tip').textContent")
    focused.send_keys(Keys.ARROW_RIGHT)
    second = shown.execute_script("return document.querySelector('#figure-plane-0-0 .tip').textContent")
    assert first.startswith("pair ") and second.startswith("pair ") and first != second
    focused.send_keys(Keys.ENTER)
    until(shown, f"return document.activeElement.id === 'pair-{second.split(':')[0].split()[1]}'")


def test_script_says_what_python_says(shown, sources):
    """Every worst card's reason, under each loss, is the sentence of `pair_sentence`."""
    shown.execute_script("document.getElementById('more').click()")
    for loss in ("dpo", "simpo"):
        choose(shown, "loss", loss)
        judged = sources[0].judged(loss).set_index("index", drop=False)
        said = shown.execute_script(
            "return [...document.querySelectorAll('#cards .card')]"
            ".map(c => [c.id, c.querySelector('.reason').textContent])"
        )
        assert len(said) >= 5
        for name, reason in said:
            row = judged.loc[int(name.split("-")[1])].to_dict()
            expected = pair_sentence(row, row)
            assert NUMBER.split(reason) == NUMBER.split(expected), loss
            printed, exact = ([float(n) for n in NUMBER.findall(text)] for text in (reason, expected))
            assert printed == pytest.approx(
                exact, rel=0.011
            )  # one of the last digit: the page's are rounded twice


def test_loss_moves_line_counts_and_cards(shown, sources):
    choose(shown, "loss", "sft")
    judged = sources[0].judged("sft")
    legend = shown.execute_script("return document.getElementById('legend').textContent")
    assert f"ideal {(judged['regime'] == 'ideal').sum()}" in legend
    said = shown.execute_script("return document.getElementById('few').textContent")
    assert said.startswith("No pair's chosen log-prob falls under sft.")
    assert shown.execute_script("return document.querySelectorAll('#cards .card').length") == 5


def test_definition_opens_beside_its_term_and_closes(shown):
    shown.execute_script("document.querySelector('.facts a[href=\"#def-precision\"]').click()")
    box = shown.execute_script(
        "const d = document.getElementById('definition'); return [d.hidden, d.textContent, document.activeElement.id]"
    )
    assert box[0] is False and "arithmetic" in box[1] and box[2] == "definition"
    shown.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    closed = (
        "return [document.getElementById('definition').hidden, document.activeElement.getAttribute('href')]"
    )
    assert shown.execute_script(closed) == [True, "#def-precision"]


def test_theme_follows_the_system_and_the_button(shown):
    ink = "return getComputedStyle(document.querySelector('#figure-plane-0-0 text')).fill"
    light = shown.execute_script(ink)
    shown.execute_script("document.getElementById('theme').click()")
    pressed = "return [document.documentElement.dataset.theme, document.getElementById('theme').ariaPressed]"
    assert shown.execute_script(pressed) == ["dark", "true"] and shown.execute_script(ink) != light
    drawn = "return getComputedStyle(document.querySelector('#figure-regimes-0-0 svg text')).fill"
    assert shown.execute_script(drawn) == shown.execute_script(ink)  # the drawings follow as well
    shown.execute_script("delete document.documentElement.dataset.theme")
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    until(shown, "return document.getElementById('theme').textContent === 'Light'")
    shown.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_network_is_forbidden(opened, page):
    show(opened, page)
    opened.execute_async_script("fetch('http://127.0.0.1:9/').then(arguments[0], arguments[0])")
    refused = complaints(opened)
    assert refused and all("Content Security Policy" in message for message in refused)


def test_page_prints(shown):
    printed = base64.b64decode(shown.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert (
        printed.startswith(b"%PDF-") and printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") > 2
    )


def test_keyboard_reaches_the_main_things(shown):
    """Landmarks, a skip link first, a caption for each table, a text for each figure, a label for each control."""
    facts = shown.execute_script("""
        const all = (s) => [...document.querySelectorAll(s)];
        return {
          first: document.querySelector('a, button, select').textContent,
          main: all('main').length, nav: all('nav[aria-label]').length,
          captions: all('table').every(t => t.caption && t.caption.textContent.trim()),
          texts: all('.plot').every(p => p.getAttribute('aria-label').length > 30),
          labels: all('input, select').every(c => c.closest('label') || c.ariaLabel),
          heads: all('th').every(h => h.scope), headings: all('h1').length,
        }""")
    assert facts == {
        "first": "Skip to the verdict",
        "main": 1,
        "nav": 1,
        "captions": True,
        "texts": True,
        "labels": True,
        "heads": True,
        "headings": 1,
    }


def test_narrow_window_has_no_sideways_scrolling(shown):
    shown.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        until(shown, "return document.documentElement.scrollWidth <= 400")
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


CONTRASTS = """
    const channels = (text) => text.match(/[\\d.]+/g).map(Number);
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => [r, g, b].map((c) => linear(c / 255))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
      for (let e = element; e; e = e.parentElement) {
        const c = channels(getComputedStyle(e).backgroundColor);
        if (c.length < 4 || c[3] > 0.99) return c;
      }
      return [255, 255, 255];
    };
    const weak = [];
    for (const element of document.querySelectorAll("body *")) {
      const words = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
      if (!words || element.closest("script, style, noscript, template, mark, [hidden]")) continue;
      if (!element.getClientRects().length) continue;
      const style = getComputedStyle(element), colour = element.closest("svg") ? style.fill : style.color;
      const [a, b] = [light(channels(colour)), light(behind(element))].sort((x, y) => y - x);
      if ((a + 0.05) / (b + 0.05) < 4.5) weak.push([element.outerHTML.slice(0, 90), (a + 0.05) / (b + 0.05)]);
    }
    return weak;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(shown, theme):
    """A contrast of 4.5 at least, of every word of the page and of its drawings."""
    shown.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    shown.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert shown.execute_script(CONTRASTS) == []


def test_whatever_scrolls_is_reached_by_keyboard(shown):
    shown.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        shown.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
        lost = shown.execute_script("""
            return [...document.querySelectorAll('body *')].filter((e) => {
              const s = getComputedStyle(e);
              const scrolls = /auto|scroll/.test(s.overflowX) && e.scrollWidth > e.clientWidth + 1
                || /auto|scroll/.test(s.overflowY) && e.scrollHeight > e.clientHeight + 1;
              return scrolls && e.tabIndex < 0 && !e.querySelector('a, button');
            }).map((e) => e.outerHTML.slice(0, 90))""")
        assert lost == []
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_filter_without_match_says_so_and_another_loss_keeps_filters(shown, sources):
    choose(shown, "words", "nowhere to be found")
    body = "return document.getElementById('body').textContent"
    assert shown.execute_script(body) == "No pair matches these filters."
    choose(shown, "words", "")
    choose(shown, "regime", "0")
    choose(shown, "loss", "simpo")
    ideal = (sources[0].judged("simpo")["regime"] == "ideal").sum()
    assert found(shown) == f"{ideal} of {COUNT} pairs"
    options = "return [...document.getElementById('regime').options].map(o => o.textContent)"
    assert f"ideal ({ideal})" in shown.execute_script(options)


def test_texts_have_their_own_direction_and_say_when_they_are_empty(opened, tmp_path):
    run = synthetic_run(tmp_path / "r", synthetic_pairs(3, norm_ratio=0.7))
    texts = pd.DataFrame(
        {
            "index": range(3),
            "prompt": "\u05e9\u05dc\u05d5\u05dd (1)",
            "chosen": "",
            "rejected": " \n",
        }
    )
    run.write_table("texts.parquet", texts)
    show(opened, write_page(load_sources([run.path]), tmp_path / "page.html"), "#pair-1")
    until(opened, "return document.activeElement.id === 'pair-1'")
    said = opened.execute_script(
        "const c = document.getElementById('pair-1');"
        "return ['prompt', 'chosen', 'rejected'].map(s => c.querySelector('.text.' + s))"
        ".map(e => [e.textContent, e.dir])"
    )
    assert [words for words, _ in said] == [
        "\u05e9\u05dc\u05d5\u05dd (1)",
        "(empty)",
        "(nothing but white space, 2 characters)",
    ]
    assert [direction for _, direction in said] == ["auto"] * 3
    assert (
        opened.execute_script("return getComputedStyle(document.querySelector('#pair-1 .prompt')).direction")
        == "rtl"
    )
    assert complaints(opened) == []
