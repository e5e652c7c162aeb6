"""What the pages take from the code: tables of options and of losses, so that each stands in one place.

`{{ options probe }}` becomes the options of that command, `{{ commands }}` the list of commands, `{{ losses }}` the
catalogue of losses, `{{ formats }}` the forms of data that are read, `{{ mitigations }}` the mitigations,
`{{ architecture }}` the page for whoever changes the code.
"""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entangle.catalogue import LossRow


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill a page's placeholders."""
    markdown = re.sub(
        r"^\{\{ options (\w+) \}\}$", lambda match: options_table(match[1]), markdown, flags=re.M
    )
    markdown = re.sub(r"^\{\{ commands \}\}$", lambda _: commands_list(), markdown, flags=re.M)
    markdown = re.sub(r"^\{\{ formats \}\}$", lambda _: formats_table(), markdown, flags=re.M)
    markdown = re.sub(r"^\{\{ architecture \}\}$", lambda _: architecture(), markdown, flags=re.M)
    markdown = re.sub(r"^\{\{ mitigations \}\}$", lambda _: mitigations_table(), markdown, flags=re.M)
    return re.sub(r"^\{\{ losses \}\}$", lambda _: losses_list(), markdown, flags=re.M)


def formats_table() -> str:
    """Every format of preference data: its name, whether it is taken by itself, and what is read as what."""
    from entangle.data import FORMATS

    rows = [
        f"| `{form.name}` | {'by itself' if form.is_automatic else 'when named'} | {form.reads} |"
        for form in FORMATS.values()
    ]
    return "\n".join(["| `--format` | taken | what is read as what |", "|---|---|---|", *rows])


def architecture() -> str:
    """The page that stands beside the code."""
    return (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")


def mitigations_table() -> str:
    """Every mitigation with its options, the first line of what its class says, and where it is from."""
    from entangle.analysis.mitigations import MITIGATIONS

    lines = ["| mitigation | what it does | from |", "|---|---|---|"]
    for name, cls in MITIGATIONS.items():
        options = ", ".join(f"`{field.name}`" for field in dataclasses.fields(cls))
        title = inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]
        cells = (f"`{name}`" + (f" ({options})" if options else ""), title, cls.source)
        lines.append("| " + " | ".join(html.escape(c, quote=False).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def losses_list() -> str:
    """The catalogue by family, a card per loss: a table of as many columns fits no screen."""
    from entangle.catalogue import loss_rows
    from losses import CATALOGUE

    rows = loss_rows()
    lines: list[str] = []
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        title = (sys.modules[CATALOGUE[own[0].name].__module__].__doc__ or "").partition("\n")[0]
        lines += ["", f"### {family}", "", title, "", *map(loss_card, own)]
    return "\n".join(lines)


def loss_card(row: LossRow) -> str:
    """One loss: name and title; formula; what its direction hangs on, what it reads, where it is from."""
    paper = text(row.paper) if row.url is None else f'<a href="{row.url}">{row.paper}</a>'
    facts = {"rho": code(row.ratio), "reads": text(row.reads), "TRL": text(row.trl or ""), "paper": paper}
    facts["paper"] += "" if row.is_confirmed else " *"
    said = " ".join(f"<span>{name} {value}</span>" for name, value in facts.items() if value)
    lines = (f"<b>{code(row.name)}</b> {text(row.title)}", code(row.formula), said)
    return f'<div class="loss" id="loss-{row.name}">' + "".join(f"<p>{line}</p>" for line in lines) + "</div>"


def code(value: str) -> str:
    """HTML of a formula or a name."""
    return f"<code>{text(value)}</code>"


def text(value: str) -> str:
    """HTML of plain words."""
    return html.escape(value, quote=False)


def commands_list() -> str:
    """Every command with its line, under the headings of `entangle --help`."""
    from entangle.cli import COMMANDS

    lines: list[str] = []
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        own = [command for command in COMMANDS.values() if command.group == group]
        lines += ["", f"**{group}**", "", *(f"- [`{c.name}`](commands/{c.name}.md): {c.line}" for c in own)]
    return "\n".join(lines[1:])


def options_table(command: str) -> str:
    """Option, default and meaning of every option of a command, own options first."""
    from entangle.cli import COMMANDS

    cls = COMMANDS[command].config
    rows = [
        f"| `{field.name}` | {default(field)} | {meaning(cls, field.name)}{known(cls, field.name)} |"
        for field in by_nearness(cls)
    ]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def by_nearness(cls: type) -> list[dataclasses.Field]:
    """Fields in the order of the classes that declare them, the class itself first."""
    declared = {
        name: depth for depth, base in reversed(list(enumerate(cls.__mro__))) for name in own_names(base)
    }
    return sorted(dataclasses.fields(cls), key=lambda field: declared[field.name])


def own_names(cls: type) -> list[str]:
    """Names that a class annotates itself."""
    return list(cls.__dict__.get("__annotations__", ()))


def default(field: dataclasses.Field) -> str:
    """A field's default as YAML would say it."""
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    if value is None or value == ():
        return ""
    shown = (
        " ".join(map(str, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if isinstance(value, bool)
        else value
    )
    return f"`{shown}`"


def meaning(cls: type, name: str) -> str:
    """The string below a field, from the class that declares it."""
    for base in cls.__mro__:
        if name in own_names(base):
            return html.escape(docstrings(base)[name], quote=False).replace("|", r"\|")
    raise LookupError(name)


def known(cls: type, name: str) -> str:
    """The names that an option may take, where its kind lists some."""
    from entangle.config.typed import types_of

    for mark in marks(types_of(cls)[name]):
        if listed := re.search(r"\{(.*)\}", getattr(mark, "metavar", None) or ""):
            return " Known: " + ", ".join(f"`{one}`" for one in listed[1].split(",")) + "."
    return ""


def marks(kind: Any) -> list[Any]:
    """The metadata of an annotation, and of the kinds that it is a union of."""
    inner = [mark for part in typing.get_args(kind) for mark in marks(part)]
    return [*getattr(kind, "__metadata__", ()), *inner]


def docstrings(cls: type) -> dict[str, str]:
    """The strings below a class's fields, in one line each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    found: dict[str, str] = {}
    for node, after in zip(body, body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
        ):
            found[node.target.id] = " ".join(ast.literal_eval(after.value).split())
    return found
