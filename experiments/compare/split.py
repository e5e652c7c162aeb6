"""Real TL;DR pairs, split once for every experiment that trains on them.

    python experiments/compare/split.py

So that a grid of runs fits a CPU, a post is cut after `POST_WORDS` words; titles and responses are whole. Of the 450
pairs 64 are held out, by their posts' hashes. Written to runs/tldr: train.jsonl, test.jsonl, posts.jsonl, the held-out
posts with the author's own TL;DR (one of the two responses of every pair is the author's), and sft.jsonl, other posts
with theirs. None of the posts of the pairs had a part in training the embedded policy without its adapter.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from entangle.data import load_pairs
from entangle.training.samples import hold_out

SOURCE = Path("../shared/data/tldr")
FOLDER = Path("runs/tldr")
POST_WORDS, HELD = 60, 64


def shortened(prompt: str) -> str:
    """The prompt with its post cut after `POST_WORDS` words."""
    head, post = prompt.removesuffix("\n\nTL;DR:").split("POST: ", 1)
    words = list(re.finditer(r"\S+", post))[:POST_WORDS]
    return f"{head}POST: {post[: words[-1].end()]}\n\nTL;DR:"


def main() -> None:
    """Write the four files."""
    authors = [
        "chosen" if json.loads(line)["chosen_source"] == "human" else "rejected"
        for line in (SOURCE / "tldr_pairs_meta.jsonl").read_text().splitlines()
    ]
    pairs = [replace(p, prompt=shortened(str(p.prompt))) for p in load_pairs(SOURCE / "tldr_pairs.jsonl")]
    train, held = hold_out(pairs, share=0.5, limit=HELD)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", held)):
        write(name, [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in part])
    write("posts", [{"prompt": p.prompt, "completion": getattr(p, authors[p.index])} for p in held])
    samples = [json.loads(line) for line in (SOURCE / "tldr_sft.jsonl").read_text().splitlines()]
    write("sft", [sample | {"prompt": shortened(sample["prompt"])} for sample in samples])
    print(f"{len(train)} pairs to train on, {len(held)} held out")


def write(name: str, rows: list[dict]) -> None:
    """Write rows as runs/tldr/<name>.jsonl."""
    (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
