"""Pairs with something to learn: of two real summaries, the one with a marked ending is chosen, whichever it is.

    python experiments/compare/split.py
    python experiments/cure/make.py

On the TL;DR pairs this policy learns no preference under any loss (held-out accuracy 40 to 60 %), so they don't show
whether a method against the fall keeps what there is to learn. Here the rule is known: the chosen summary ends with
" Thanks.", the rejected one with " Cheers.", and which of the two summaries is chosen is drawn by a hash. Written to
runs/rule: train.jsonl and test.jsonl.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

SOURCE, FOLDER = Path("runs/tldr"), Path("runs/rule")
ENDINGS = {"chosen": " Thanks.", "rejected": " Cheers."}


def ruled(row: dict[str, str]) -> dict[str, str]:
    """The pair, perhaps exchanged, with its endings."""
    texts = [row["chosen"], row["rejected"]]
    if hashlib.sha256(row["prompt"].encode()).digest()[0] % 2:
        texts.reverse()
    marked = {side: text + ending for (side, ending), text in zip(ENDINGS.items(), texts, strict=True)}
    return {"prompt": row["prompt"]} | marked


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (SOURCE / f"{name}.jsonl").read_text().splitlines()]
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(ruled(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
