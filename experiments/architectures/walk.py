"""Every causal architecture that transformers registers, tiny and random, held against plain autograd in float64.

    python experiments/architectures/walk.py [MODEL_TYPE ...]

Of each, all parameters and a LoRA on all linear layers are probed; Gram matrices and log-probs of four rows are
compared with gradients that this file takes itself: a row alone, no cache, no padding, plain `torch.autograd.grad`.
Without arguments the outcome of the whole walk is written to `docs/architectures.md`.
"""

from __future__ import annotations

import html
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from entangle.errors import UserError
from entangle.scores import make_engine
from entangle.scores.factored import FactoredEngine
from entangle.scores.logps import causal_lm, known_inputs
from entangle.scores.rows import RowBatch
from experiments.architectures.shapes import ARCHITECTURES, VOCABULARY, tiny_model

OUTPUT = Path("docs/architectures.md")
TOLERANCE = 1e-6
"""Relative error of a dot product that still counts as exact: parts of some models stay float32 inside."""


@dataclass(frozen=True)
class Outcome:
    """What became of one kind of probe of one architecture.

    Args:
        verdict: `exact`, `fallback`, `refused`, `wrong` or `not built`.
        why: a sentence, empty for `exact`.
        error: relative error of the worst dot product; None where nothing was computed.
    """

    verdict: str
    why: str = ""
    error: float | None = None


def walk(kind: str) -> dict[str, Outcome]:
    """Outcomes by what is probed, `full` and `lora`."""
    outcomes = {}
    for probed in ("full", "lora"):
        try:
            model = tiny_model(kind).requires_grad_(True)
            row_logp(model, batch_rows(pairs())[0])
        except Exception as error:  # the shape doesn't fit, or a token row isn't all that the model needs
            return dict.fromkeys(("full", "lora"), Outcome("not built", first_line(error)))
        try:
            model = model if probed == "full" else with_lora(model)
            if probed == "lora" and not runs(model):
                model = with_lora(tiny_model(kind), ROUTERS)
                row_logp(model, batch_rows(pairs())[0])
        except Exception as error:  # PEFT refuses the model, or can't run it
            outcomes[probed] = Outcome("not built", first_line(error))
            continue
        outcomes[probed] = judge(model)
    return outcomes


def judge(model: nn.Module) -> Outcome:
    """Hold the engine that a probe would take against gradients taken here."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch = pairs()
    try:
        engine = make_engine(model, parameters)
        gram, logps = engine.gram(batch), engine.pairs(batch).logps
    except UserError as error:
        return Outcome("refused", str(error).split(" (")[0].split(": ")[0])
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {first_line(error)}")
    expected_gram, expected_logps = by_hand(model, parameters, batch)
    norms = expected_gram.diagonal().sqrt()
    error = float(((gram - expected_gram).abs() / (norms[:, None] * norms)).max())
    if not error < TOLERANCE or not torch.allclose(logps, expected_logps, rtol=1e-6, atol=1e-6):
        off = float((logps - expected_logps).abs().max())
        return Outcome("wrong", f"dot products off by {error:.1e}, log-probs by {off:.1e} nats", error)
    slow = set(parameters) - (engine.covered if isinstance(engine, FactoredEngine) else set())
    if slow:
        return Outcome("fallback", f"{len(slow)} of {len(parameters)}, {slow_parts(slow)}", error)
    return Outcome("exact", "", error)


def pairs() -> RowBatch:
    """Two pairs with prompts and responses of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(7)

    def draw(size: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (size,), generator=generator)

    prompts = [draw(4), draw(7)]
    rows = [(prompts[0], draw(3)), (prompts[1], draw(5)), (prompts[0], draw(4)), (prompts[1], draw(2))]
    width = max(len(head) + len(tail) for head, tail in rows)
    ids, mask, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (head, tail) in enumerate(rows):
        length = len(head) + len(tail)
        ids[i, :length], mask[i, :length] = torch.cat([head, tail]), 1
        scored[i, len(head) : length] = 1
    return RowBatch(ids, mask, scored, torch.tensor([len(prompt) for prompt in prompts]))


def batch_rows(batch: RowBatch) -> list[tuple[Tensor, Tensor]]:
    """Token ids `(1, T)` and the positions of the scored tokens of every row, without padding."""
    rows = zip(batch.input_ids, batch.attention_mask.bool(), batch.completion_mask.bool(), strict=True)
    return [(ids[real][None], scored[real].nonzero()[:, 0]) for ids, real, scored in rows]


def row_logp(model: nn.Module, row: tuple[Tensor, Tensor]) -> Tensor:
    """The log-prob of one row, float64, by the plainest forward pass there is."""
    ids, scored = row
    with plain_experts(model):
        logits = model(**known_inputs(model, {"input_ids": ids, "use_cache": False})).logits
    return logits.double().log_softmax(-1)[0, scored - 1, ids[0, scored]].sum()


def runs(model: nn.Module) -> bool:
    """Whether a plain forward pass works."""
    try:
        row_logp(model, batch_rows(pairs())[0])
    except Exception:
        return False
    return True


def by_hand(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: RowBatch
) -> tuple[Tensor, Tensor]:
    """Gram matrix and log-probs of every row."""
    scores, logps = [], []
    for row in batch_rows(batch):
        logp = row_logp(model, row)
        grads = torch.autograd.grad(
            logp, list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        scores.append(torch.cat([grad.double().ravel() for grad in grads]))
        logps.append(logp.detach())
    matrix = torch.stack(scores)
    return matrix @ matrix.T, torch.stack(logps)


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Within: experts are evaluated one by one, which every precision can do."""
    config: Any = causal_lm(model).config
    before = config._experts_implementation
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before


ROUTERS = r".*\.(router|gate)"
"""Linear layers that return several values in some models: PEFT can wrap them, but not run them."""


def with_lora(model: nn.Module, exclude: str | None = None) -> PeftModel:
    """The model with a LoRA on all linear layers whose B isn't zero."""
    turned = any(isinstance(module, Conv1D) for module in model.modules())
    options = LoraConfig(
        r=2, lora_alpha=3, target_modules="all-linear", fan_in_fan_out=turned, exclude_modules=exclude
    )
    adapted = get_peft_model(model, options, autocast_adapter_dtype=False)  # pyright: ignore
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted.double().eval()  # pyright: ignore


def first_line(error: Exception) -> str:
    """The first line of a message that says something, at most 100 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if not line.endswith(":")), type(error).__name__)
    return line if len(line) <= 100 else line[:100].rsplit(" ", 1)[0] + " ..."


def slow_parts(names: Iterable[str]) -> str:
    """Parameters that go by autograd, told by the last two parts of their names, four of them at most."""
    parts = [[part for part in name.split(".") if not part.isdigit() and part != "default"] for name in names]
    kinds = sorted({".".join([p for p in own if p not in ("weight", "base_layer")][-2:]) for own in parts})
    return ", ".join(f"`{kind}`" for kind in kinds[:4]) + (", ..." if len(kinds) > 4 else "")


def page(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The page of the documentation."""
    built = {kind: found for kind, found in outcomes.items() if found["full"].verdict != "not built"}
    rows = [
        f"| `{kind}` | {ARCHITECTURES[kind]} | {cell(found['full'])} | {cell(found['lora'])} |"
        for kind, found in built.items()
    ]
    out = [
        f"- `{kind}`: {html.escape(found['full'].why, quote=False)}"
        for kind, found in outcomes.items()
        if kind not in built
    ]
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (transformers, peft, torch))
    counts = {
        probed: ", ".join(
            f"{n} {verdict}"
            for verdict in ("exact", "fallback", "refused", "wrong", "not built")
            if (n := sum(found[probed].verdict == verdict for found in built.values()))
        )
        for probed in ("full", "lora")
    }
    return PAGE.format(
        versions=versions,
        all=len(outcomes),
        built=len(built),
        full=counts["full"],
        lora=counts["lora"],
        tolerance=f"{TOLERANCE:.0e}",
        rows="\n".join(rows),
        out="\n".join(out),
    )


def cell(outcome: Outcome) -> str:
    """A verdict and why, as a cell of the table."""
    return outcome.verdict + (
        f": {html.escape(outcome.why, quote=False).replace('|', '/')}" if outcome.why else ""
    )


PAGE = """# Architectures

Every model type that transformers registers for causal language modelling ({all}) was built from its config as small as
it goes, with random float64 weights, and probed with all of its parameters and with a LoRA on all of its linear layers.
Dot products and log-probs of four rows were compared with gradients that the script takes itself: one row at a time, no
cache, no padding, plain `torch.autograd.grad`. {built} could be built so:

- with all parameters {full};
- with LoRA {lora}.

Written by `experiments/architectures/walk.py` with {versions}.

- **exact**: all parameters go by a fast rule, and agree within {tolerance} (some models compute parts in float32).
- **fallback**: agrees as well; the parameters named have no fast rule and cost a forward and a backward pass per
  response, which a run says in its notes. `--engine autograd` takes that way for all parameters.
- **refused**: the command ends before the passes and says why. Encoders that are loaded as causal models let later
  tokens change earlier ones; with `is_decoder: true` in their config they don't, and are measured like any other.
- **not built**: PEFT or transformers can't make or run this one.

What such a walk can't show: rows are short, so whatever begins beyond some thousand tokens (the choice of keys in
sparse attention) isn't reached. Every run therefore makes its checks again on its own model, with its longest rows.

| model type | class | all parameters | LoRA |
|---|---|---|---|
{rows}

## Not built

Larger than a tiny model at the smallest shape tried, several modalities in one, or not to be run on token ids in
float64:

{out}
"""


def main() -> None:
    """Walk, print, and write the page if everything was walked."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    outcomes: dict[str, dict[str, Outcome]] = {}
    for kind in sys.argv[1:] or ARCHITECTURES:
        outcomes[kind] = walk(kind)
        for probed, outcome in outcomes[kind].items():
            error = "" if outcome.error is None else f"{outcome.error:.1e}"
            print(f"{kind:28} {probed:5} {outcome.verdict:10} {error:8} {outcome.why}", flush=True)
    if len(sys.argv) == 1:
        OUTPUT.write_text(page(outcomes))


if __name__ == "__main__":
    main()
