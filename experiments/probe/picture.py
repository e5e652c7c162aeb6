"""The picture of the README: the embedded pairs in the plane of norm ratio and cosine.

entangle probe --losses dpo_shift:shift=0.9 dpo --output_dir runs/picture
python experiments/probe/picture.py runs/picture docs/plane.png
"""

from __future__ import annotations

import sys

from entangle import ProbeResult
from entangle.analysis.predictions import is_scored
from entangle.figures.pairs import plane
from entangle.figures.style import new_axes, save


def draw(run: str, output: str, losses: tuple[str, ...] = ("dpo_shift(shift=0.9)", "dpo")) -> None:
    """Draw a finished probe; colours are the regimes under the first loss, lines the borders of each."""
    result = ProbeResult.load(run)
    scored = result.pairs[is_scored(result.pairs)]
    regimes = result.predictions.query("loss == @losses[0]").set_index("index")["regime"]
    ratios = {loss: result.summary["incentive_ratio"][loss] for loss in losses}
    axes = plane(new_axes(7.6, 4.4), scored, regimes.loc[scored["index"]], ratios)
    axes.set_title(f"{len(scored)} pairs, regimes under {losses[0]}", loc="left", fontsize=10)
    save(axes, output)


if __name__ == "__main__":
    draw(sys.argv[1], sys.argv[2])
