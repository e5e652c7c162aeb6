"""The embedded policy's model card and loss curve, drawn from its training record."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plot  # noqa: E402

Curves = dict[str, list[dict[str, float]]]

INTRODUCTION = """# The embedded policy

A very small Llama, trained from nothing on Reddit TL;DR posts and their authors' summaries, with its
own tokenizer and (in `../adapter`) a LoRA adapter trained by a few DPO steps. It is shipped so that
gradient measurements on a real, trained language model run offline.

`experiments/embedded/train.py` wrote every file of this folder, this card included, from the seed
below; `training.json` holds the settings and all figures in machine-readable form.
"""

LIMITS = """## Intended use and limits

- **An instrument, not a writer.** It is for measuring gradients of preference losses where a policy is
  needed that has learnt something about the texts. Its summaries are poor: fluent for a few words,
  rarely true to the post.
- English Reddit prose only. It was not tested for, and must not be used for, decisions about people.
- The posts are public, by pseudonymous authors, and personal in tone (relationships, money, health).
  Their stereotypes and swearing are in the model, and short passages of a post may be reproduced. The
  training text itself isn't shipped; the tokenizer's vocabulary holds its frequent words and word
  parts.
- What is measured on two million parameters need not hold for a large model.
"""

DATA = """## Training data and attribution

- **Webis-TLDR-17**: Michael Völske, Martin Potthast, Shahbaz Syed, Benno Stein, "TL;DR: Mining Reddit
  to Learn Automatic Summarization", 2017. Licence CC BY 4.0. All posts and authors' summaries come from
  it, in the form filtered by OpenAI for "Learning to summarize from human feedback" (licence of its
  release: modified MIT).
- The posts of the first stage were taken from GitHub `sauc-abadal/ALT` (licence MIT, 2024), which
  repeats posts of that set.
- The summaries of the second stage, and the preference pairs of the adapter, were taken from GitHub
  `vwxyzjn/summarize_from_feedback_details` (licence MIT, copyright 2024 Costa Huang), file
  `eval/oai1b.csv_judged.csv`. In a pair one text is the author's, the other a sample of OpenAI's 1.3B
  summarisation policy (modified MIT); the preference is GPT-4's judgement, not a person's.

Changes to the data: rows were dropped by a wide keyword filter (self-harm, slurs, sexual content,
stated ages under 18, personal identifiers) and near-duplicates were removed; a control prefix was cut
off the ALT posts.
"""

REPRODUCING = """## Reproducing it

```
python experiments/embedded/train.py --data FOLDER
```

One CPU thread, float32 weights, bfloat16 autocast for training's forward and backward passes, float32 for
every evaluation. All draws come from the seed. Stage 1 was run twice on one machine, in processes of their own: its
loss curve agreed to the last printed digit (17 significant ones) at every point. Stage 2 and the adapter were run
once as they stand. Another processor or another version of torch may round differently.
"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _architecture(record: dict[str, Any]) -> str:
    settings = record["settings"]
    head_width = settings["width"] // settings["heads"]
    return f"""## Architecture

`LlamaForCausalLM`, **{record["parameters"]:,} parameters**, float32: {settings["layers"]} layers, width
{settings["width"]}, {settings["heads"]} attention heads of {head_width}, feed-forward width \
{settings["feed_forward"]}, tied embeddings, {settings["positions"]}
positions. Tokenizer: byte-level BPE of {settings["vocabulary"]} tokens without a normaliser, so any text
comes back exactly; `<|endoftext|>` ends a text, `<|pad|>` pads, nothing is added automatically and there is
no chat template. A prompt ends in `TL;DR:` and a response begins with one space.
"""


def _scores(record: dict[str, Any]) -> str:
    rows = [
        [
            texts,
            model,
            f"{score['rows']}",
            f"{score['bytes']:,}",
            f"{score['nats_per_token']:.3f}",
            f"**{score['nats_per_byte']:.3f}** ± {score['standard_error']:.3f}",
        ]
        for texts, scores in record["scores"].items()
        for model, score in scores.items()
    ]
    header = ["texts", "model", "rows", "bytes", "nats/token", "nats/byte"]
    return f"""## Loss

Cross entropy of a summary given its post: the summary's text alone, no end of text. Tokens differ between the
models, so nats per byte is what compares; after ± its standard error over rows.

{_table(header, rows)}
`stories260k` is Andrej Karpathy's `stories260K` (trained on TinyStories, 260,032 parameters, MIT licence), a
much smaller model of other text, run with its prompts cut to their last 350 tokens. The held-out summaries
chose the checkpoint, so their figure for this policy is slightly flattering; the pairs' posts and texts had
no part in training the policy.
"""


def _curves(curves: Curves) -> str:
    language = [
        [
            f"{point['step']}",
            f"{point['epoch']:.1f}",
            f"{point['train']:.3f}",
            f"{point['held_out']:.3f}",
            f"{point['held_out_summaries']:.3f}",
        ]
        for point in curves["language"]
    ]
    summarise = [
        [f"{point['step']}", f"{point['epoch']:.1f}", f"{point['train']:.3f}", f"{point['held_out']:.3f}"]
        for point in curves["summarise"]
    ]
    before = curves["language"][-1]["held_out_summaries"]
    after = min(point["held_out"] for point in curves["summarise"])
    kept = "that line is kept" if after < before else "it did not help, and the end of stage 1 is kept"
    first = _table(["step", "epoch", "train", "held-out posts", "held-out summaries"], language)
    second = _table(["step", "epoch", "train", "held-out summaries"], summarise)
    return f"""## Loss curve

![loss by epoch](loss.svg)

Nats per token; the training loss is the mean since the line above, a summary's loss counts its end of text.
Either stage keeps its best point, its start included, by the first held-out column.

Stage 1, language modelling:

{first}
Stage 2, summaries (the training loss counts the prompt with a small weight):

{second}
Held-out summaries, nats per token with the end of text: {before:.3f} at the end of stage 1, {after:.3f} at
the best line of stage 2: {kept}.
"""


def _hyper_parameters(record: dict[str, Any]) -> str:
    settings, seconds = record["settings"], record["seconds"]
    stages = [
        [
            name,
            f"{settings[name]['epochs']}",
            f"{settings[name]['learning_rate']:g}",
            f"{settings[name]['warm_up_steps']}",
            f"{settings[name]['tokens_per_batch']}",
            f"{settings[name]['weight_decay']:g}",
            f"{settings[name]['prompt_weight']:g}",
            f"{seconds[name]:.0f} s",
        ]
        for name in ("language", "summarise")
    ]
    header = ["stage", "epochs", "peak learning rate", "warm-up steps", "tokens per batch", "weight decay"]
    header += ["prompt weight", "time"]
    posts, summaries = settings["posts"], settings["summaries"]
    held_posts, held_summaries = settings["posts_held_out"], settings["summaries_held_out"]
    return f"""## Training

Seed {settings["seed"]}. {posts} posts, {held_posts} of them held out; {summaries} posts with summaries, \
{held_summaries} of them held
back; both drawn by the seed. Stage 1 reads the training posts and the training summaries behind their posts,
one document per row; stage 2 the latter alone. AdamW (0.9, 0.95), linear warm-up, half a cosine down to 5%,
gradient norm clipped at 1.

{_table(header, stages)}
The adapter: LoRA of rank {settings["adapter_rank"]}, alpha {settings["adapter_alpha"]}, on every linear \
layer of attention and feed-forward, trained by TRL's
`DPOTrainer` for {settings["adapter_steps"]} steps of {settings["adapter_batch"]} pairs (the last \
{settings["adapter_pairs"]} of the 450, learning rate {settings["adapter_learning_rate"]:g}, beta \
{settings["adapter_beta"]:g}) in
{seconds["adapter"]:.0f} s. It was trained just far enough that both LoRA factors are away from zero.

Times are wall-clock seconds on {settings["threads"]} thread of a {platform.machine()} CPU shared with \
other work. torch {version("torch")}, transformers
{version("transformers")}, trl {version("trl")}, peft {version("peft")}, tokenizers {version("tokenizers")}.
"""


def write_card(record: dict[str, Any], path: Path) -> None:
    """Writes the model card of a training record."""
    parts = [
        INTRODUCTION,
        _architecture(record),
        _scores(record),
        _curves(record["curves"]),
        _hyper_parameters(record),
        DATA,
        REPRODUCING,
        LIMITS,
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def draw_curve(curves: Curves, path: Path) -> None:
    """Draws the losses of both stages, in nats per token over epochs, as an SVG."""
    panels = {
        "language": ("Stage 1: language modelling", {"held_out": "held-out posts"}),
        "summarise": ("Stage 2: summaries", {"held_out": "held-out summaries"}),
    }
    panels["language"][1]["held_out_summaries"] = "held-out summaries"
    colours = {"training": "#777777", "held-out posts": "#0a6ebd", "held-out summaries": "#c0561a"}
    with matplotlib.rc_context({"svg.hashsalt": "entangle", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = plot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
        for axis, (stage, (title, lines)) in zip(axes, panels.items(), strict=True):
            epochs = [point["epoch"] for point in curves[stage]]
            for key, label in {"train": "training", **lines}.items():
                losses = [point[key] for point in curves[stage]]
                axis.plot(epochs, losses, marker="o", markersize=3, color=colours[label], label=label)
            axis.set(title=title, xlabel="epoch")
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
        axes[0].set_ylabel("nats per token")
        figure.savefig(path, format="svg", metadata={"Date": None})
        plot.close(figure)
