"""Files with a fault in them, drawn from a seed: what fuzzing puts before readers."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import yaml

WRONG = (
    None,
    True,
    False,
    0,
    -1,
    3,
    1e400,
    float("nan"),
    -0.5,
    10**30,
    "",
    "four",
    "yes",
    "\x00",
    "\x1b[31m",
    "a" * 5000,
    "../../..",
    [],
    [None],
    [[[]]],
    {},
    {"a": None},
    {1: 2},
    {"name": 3},
    {"name": "dpo", "beta": "abc"},
    {"name": "dpo", "beta": []},
    ["dpo", 3],
    [{"name": "no_such_loss"}],
    "dpo:beta",
    "os:system",
    "no_such_module:F",
    "sigmoid",
    "2024-01-01",
    2024,
    [1, 2, 3],
    ["x"] * 50,
    {"loss": "dpo"},
)
"""Values that hardly any option takes."""

TEXTS = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"{",
    b"[",
    b"- a\n- b\n",
    b"a: [1, 2",
    b"a: &x [*x]\n",
    b"a: !!python/object:os.system {}\n",
    b"? {a: b}\n: c\n",
    b"a: 2024-99-99\n",
    b"3: 4\n",
    b"null: 1\n",
    b"true: 1\n",
    b"a: *missing\n",
    b"text",
    b"[" * 600,
    b"a: " + b"9" * 5000 + b"\n",
    b"limit: !!int x\n",
    b"a: !!binary ====\n",
    b"%YAML 9.9\n---\na: b\n",
    b"&a a: &b {c: *b}\n",
    b"x: &x [a, a]\ny: &y [*x, *x]\nz: [*y, *y]\n",
    b"\t\tlimit: 3",
    b"limit: 3\nlimit: four\n",
)
"""Files that aren't what they should be at all."""


def options_with_a_fault(content: dict[str, Any], keys: list[str], draw: random.Random) -> bytes:
    """A YAML file of options with one to three faults: wrong values, keys that there aren't, or broken bytes."""
    content = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        kind = draw.random()
        if kind < 0.6:
            content[draw.choice(keys)] = draw.choice(WRONG)
        elif kind < 0.7:
            content[draw.choice(["betaa", "", 3, None, "loss_type", "stage", "adapter"])] = draw.choice(WRONG)
        elif kind < 0.8 and content:
            key = draw.choice(list(content))
            content[draw.choice(keys)] = content.pop(key)
        elif content:
            content[draw.choice(list(content))] = [draw.choice(WRONG) for _ in range(draw.randint(1, 3))]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=draw.random() < 0.5).encode()
    if draw.random() < 0.2:
        text = draw.choice(TEXTS) if draw.random() < 0.5 else text + draw.choice(TEXTS)
    return broken(text, draw) if draw.random() < 0.2 else text


def broken(content: bytes, draw: random.Random) -> bytes:
    """The same bytes with a fault: cut, flipped, doubled, or another thing in the middle."""
    if not content:
        return b"\x00"
    at, kind = draw.randrange(len(content)), draw.randrange(5)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + content[: draw.randrange(len(content))] + content[at:]
    if kind == 3:
        return content[:at] + draw.choice(TEXTS) + content[at:]
    return bytes(draw.randrange(256) for _ in range(draw.randrange(64)))


def json_with_a_fault(content: Any, draw: random.Random) -> Any:
    """The same JSON value with one value gone, or of another kind, anywhere in it."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    if not places:
        return draw.choice(WRONG[:8])
    parent, key = draw.choice(places)
    if draw.random() < 0.4 and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = draw.choice([None, True, 0, -1, "x", [], {}, [1], {"a": 1}])
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield content, key
        yield from _places(value)
