"""Sentiment pairs whose responses differ in one token: nothing, a short or a long text after it is the same.

    python experiments/suffix/make.py

The setting of arXiv 2410.13828's sentiment study on sentences of our own: a review, and the right and the wrong word
for its sentiment as chosen and rejected response. `none` ends after the word, `short` and `long` go on with one text
in both responses. (An end-of-text token, the same in both, follows everywhere.) 96 pairs to train on, 48 held out,
about other subjects; written to runs/suffix/<suffix>/{train,test}.jsonl.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

FOLDER = Path("runs/suffix")

SUFFIXES = {
    "none": "",
    "short": " in tone, I would say.",
    "long": (
        " in tone, I would say, and anyone who reads the whole text a second time and thinks about what the person "
        "wanted to tell us will come to the same result."
    ),
}
"""What follows the word in both responses."""

SUBJECTS = {
    "train": (
        "film",
        "phone",
        "game",
        "hotel",
        "book",
        "car",
        "class",
        "job",
        "house",
        "song",
        "trip",
        "friend",
    ),
    "test": ("show", "computer", "restaurant", "bike", "story", "bed"),
}

OPINIONS = {
    "positive": (
        "I love this {} and I would buy it again.",
        "This {} made my whole week better.",
        "The {} is great, it works and it looks nice.",
        "Best {} I have had in years, I am so happy with it.",
    ),
    "negative": (
        "I hate this {} and I want my money back.",
        "This {} made my whole week worse.",
        "The {} is awful, it broke on the first day.",
        "Worst {} I have had in years, I am so sad about it.",
    ),
}


def rows(split: str, suffix: str) -> list[dict[str, str]]:
    """The pairs of a split with a suffix, sentiments in turn."""
    wrong = {"positive": "negative", "negative": "positive"}
    return [
        {
            "prompt": f"REVIEW: {opinion.format(subject)}\n\nThe review is",
            "chosen": f" {word}{SUFFIXES[suffix]}",
            "rejected": f" {wrong[word]}{SUFFIXES[suffix]}",
        }
        for subject, number in itertools.product(SUBJECTS[split], range(4))
        for word, opinion in ((word, OPINIONS[word][number]) for word in OPINIONS)
    ]


def main() -> None:
    """Write all files."""
    for suffix, split in itertools.product(SUFFIXES, SUBJECTS):
        folder = FOLDER / suffix
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(split, suffix)))


if __name__ == "__main__":
    main()
