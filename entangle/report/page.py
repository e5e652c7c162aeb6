"""One self-contained HTML file from one or several runs. Text from data is untrusted: escaped wherever it goes.

Nothing is loaded from elsewhere: a content security policy forbids the network, and of scripts it allows only those of
the page, by their hashes. Needs jinja2 and matplotlib.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from entangle.analysis.regimes import REGIMES
from entangle.analysis.wording import SENTENCES, reference_text, spoken
from entangle.errors import RunError, UserError
from entangle.figures.pairs import set_spread
from entangle.figures.style import MARKERS, REGIME_COLOURS
from entangle.report import drawing
from entangle.report.blocks import Figure, Prose, Section, Table
from entangle.report.glossary import definition_key, glossary
from entangle.report.pairs import has_pairs
from entangle.report.rows import COLUMNS, INFINITE, extra_columns, pair_rows
from entangle.report.sections import sections
from entangle.report.source import Source
from entangle.report.verdict import decision, verdict
from entangle.runs.atomic import replacing
from entangle.tables.base import count_line, model_name
from entangle.tables.sets import cosine_interval, interval
from entangle.version import __version__

LARGEST = 14_000_000
"""Bytes that a page may have, about; what doesn't fit of the pairs is sampled, and the page says so."""


def write_page(sources: Sequence[Source], path: str | Path) -> Path:
    """Write the page of some runs to `path`, whole or not at all.

    Raises:
        UserError: jinja2 or matplotlib isn't installed.
        RunError: `path` can't be written.
    """
    target = Path(path)
    text = render_page(sources)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"Can't write {target}: {error.strerror or error}. Choose another --output."
        ) from error
    return target


def render_page(sources: Sequence[Source]) -> str:
    """The page as text.

    Args:
        sources: the runs, shown side by side in this order.

    Raises:
        UserError: jinja2 or matplotlib isn't installed.
    """
    environment, shown = _environment(), sections(sources)
    drawn = {
        f"{section.key}-{run}-{place}": block
        for section in shown
        for run, blocks in section.columns.items()
        for place, block in enumerate(blocks)
        if isinstance(block, Figure)
    }
    pictures = {
        key: "" if figure.live else drawing.svg(figure.draw, figure.page_width, key)
        for key, figure in drawn.items()
    }
    live = {
        key: {"view": figure.live, "run": int(key.split("-")[1])}
        for key, figure in drawn.items()
        if figure.live
    }
    left = LARGEST - sum(map(len, pictures.values()))
    runs = [_run(source, left // len(sources)) for source in sources]
    content = {
        "live": live,
        "runs": runs,
        "sentences": SENTENCES,
        "infinite": INFINITE,
        "regimes": [
            {
                "name": str(regime),
                "text": spoken(regime),
                "colour": f"var({drawing.THEME[REGIME_COLOURS[regime]]})",
                "mark": MARKERS[regime],
            }
            for regime in REGIMES
        ],
        "columns": [{"name": name, "text": text} for name, text, _ in COLUMNS],
    }
    script = _asset("report.js")
    entries = glossary(extra["name"] for run in runs for extra in run["extra"])
    facts, any_pairs = [_facts(source) for source in sources], any(map(has_pairs, sources))
    return environment.get_template("page.html").render(
        title=f"Gradient entanglement: {'; '.join(title_of(source) for source in sources)}",
        version=__version__,
        policy=_policy([script]),
        css=_style(),
        script=script,
        content=safe_json(content),
        pictures=pictures,
        sections=shown,
        glossary=entries
        if any_pairs
        else {key: entries[key] for key in entries if key in _terms(shown, facts)},
        columns=COLUMNS,
        runs=[
            run | _said(source) | {"facts": fact, "about": _about(source)}
            for run, source, fact in zip(runs, sources, facts, strict=True)
        ],
        has_pairs=any_pairs,
    )


def _said(source: Source) -> dict[str, Any]:
    """The head of a run: its title, what is decided, and the sentences below."""
    decided, said = decision(source), verdict(source)
    is_repeated = decided is not None and source.pairs is None and source.variants is None
    repeated = 1 if is_repeated else 0  # the headline is the first sentence
    return {"title": title_of(source), "decision": decided, "verdict": said[repeated:]}


def title_of(source: Source) -> str:
    """Data set and model of a run, as far as they are known; else its folder's name."""
    known = [_data_name(source), model_name(source.provenance) if _has_model(source) else ""]
    return ", ".join(dict.fromkeys(filter(None, known))) or source.name


def _has_model(source: Source) -> bool:
    return bool(source.provenance.get("model_name_or_path"))


def _data_name(source: Source) -> str:
    """The last part of the data set's name, which may be a path."""
    return str(source.config.get("dataset_name") or "").rstrip("/").rpartition("/")[2]


def _style() -> str:
    """The style sheet, with the colours of data that its figures use."""
    text = _asset("report.css")
    for is_dark in (False, True):
        mark = f"/* data colours, {'dark' if is_dark else 'light'} */"
        text = text.replace(mark, drawing.palette(is_dark))
    return text


def _terms(shown: Sequence[Section], facts: Sequence[Sequence[tuple[str, str, str]]]) -> set[str]:
    """Keys of the definitions that sections and facts refer to."""
    blocks = [block for section in shown for column in section.columns.values() for block in column]
    tables = [
        block if isinstance(block, Table) else block.table for block in blocks if not isinstance(block, Prose)
    ]
    return {
        *(key for section in shown for key in section.terms),
        *(key for row in facts for _, _, key in row),
        *(heading.term for table in tables if table is not None for heading in table.head),
    }


def safe_json(content: Any) -> str:
    r"""JSON for a script element: no character that HTML or an old parser could read as the end of it.

    >>> safe_json("</script>&\u2028")
    '"\\u003c/script\\u003e\\u0026\\u2028"'
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: these scripts, the page's own styles and pictures, nothing else."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UserError("The report needs jinja2: pip install jinja2 matplotlib") from error
    environment = Environment(
        loader=PackageLoader("entangle.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment


def _asset(name: str) -> str:
    return (resources.files("entangle.report") / "static" / name).read_text(encoding="utf-8")


def _run(source: Source, budget: int) -> dict[str, Any]:
    rows = pair_rows(source, budget) if has_pairs(source) else None
    return {
        "name": source.name,
        "path": source.path,
        "pairs": rows,
        "extra": [
            {"name": name, "text": spoken(name), "term": definition_key(name)}
            for name in ([] if rows is None else extra_columns(source.scored))
        ],
        "scope": _scope(source.provenance),
        "set": None if rows is None else _set_mark(source.summary.get("set")),
    }


def _set_mark(whole: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Where the set stands in the plane of pairs, with its intervals; None where it isn't known well enough."""
    if whole is None or (spread := set_spread(whole)) is None:
        return None
    ratio, cosine = spread
    told = [f"norm ratio {interval(whole['norm_ratio'])}", f"cosine {cosine_interval(whole)}"]
    return {
        "norm_ratio": ratio,
        "cosine": cosine,
        "hollow": whole["may_be_parallel"],
        "text": f"the set of {whole['pairs']} pairs: {', '.join(told)}",
    }


def _scope(provenance: Mapping[str, Any]) -> str:
    """Precision, parameters and metric in a few words: what every number of a run assumes."""
    parts = []
    if "score_dtype" in provenance:
        parts.append(f"scores in {provenance['score_dtype']}")
    if "probed_parameters" in provenance:
        parts.append(f"{provenance['probed_parameters']:,} {provenance.get('probed_kind', '')} parameters")
    if "metric" in provenance:
        parts.append(f"{str(provenance['metric']).upper()} metric")
    return ", ".join(parts)


def _facts(source: Source) -> list[tuple[str, str, str]]:
    """What was measured, on what, how exactly: (name, value, key of the definition)."""
    known = source.provenance
    facts = [("run", source.name, "")]
    if data := str(source.config.get("dataset_name") or ""):
        facts.append(("data", data, ""))
    if source.pairs is not None:
        facts.append(("pairs", count_line(source.summary, {}), ""))
    if _has_model(source):
        facts.append(("model", model_name(known), ""))
    if adapter := known.get("adapter_name_or_path"):
        facts.append(("adapter", str(adapter), ""))
    if "model_parameters" in known:
        facts.append(("size", f"{known['model_parameters']:,} parameters", ""))
    if "probed_parameters" in known:
        facts.append(
            ("measured", f"{known['probed_parameters']:,} ({known.get('probed_kind', '?')})", "parameters")
        )
    for key, name, term in (
        ("score_dtype", "precision", "precision"),
        ("metric", "metric", "metric"),
        ("reference", "reference", "reference"),
    ):
        if key in known:
            value = str(known[key])
            facts.append((name, value.upper() if key == "metric" else reference_text(value), term))
    return [*facts, *([("date", source.finished, "")] if source.finished else [])]


def _about(source: Source) -> list[tuple[str, str]]:
    """Everything that the provenance says, as text."""
    flat: list[tuple[str, str]] = []
    for key, value in source.provenance.items():
        if isinstance(value, Mapping):
            flat += [(f"{key}: {name}", str(item)) for name, item in value.items()]
        elif isinstance(value, list):
            flat += [(key, str(item)) for item in value]
        elif value is not None:
            flat.append((key, str(value)))
    return flat
