"""Which tokens entangle a pair: the pairs of a finished probe taken apart into their tokens.

The policy and the data are loaded again from the run's own options, and must still be the same. For every token
of both responses: what it adds to A, B and c, and how much each loss of the run would move its log-prob.

    RUN/tokens.parquet        one row per token of the pairs asked for
    RUN/tokens/<index>.png    heat map of all token-by-token cosines, where asked for
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from rich.console import Console, Group, RenderableType
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from entangle.analysis.geometry import SIDES
from entangle.analysis.predictions import is_scored
from entangle.analysis.verdict import worst_pairs
from entangle.commands.output import Output
from entangle.commands.probe import ProbeResult
from entangle.config import TokensConfig, build_losses
from entangle.data import TokenizedPair
from entangle.errors import ConfigError, RunError
from entangle.measure.plan import extremes
from entangle.measure.reload import load_again, metric_again, options_of
from entangle.models import Policy
from entangle.runs.progress import notes_console
from entangle.scores import Metric, make_engine
from entangle.scores.check import logps_agree
from entangle.scores.float64 import KeepFloat64
from entangle.scores.tokens import TokenProducts, token_products
from entangle.tables.base import Shown, heading
from entangle.tables.tokens import token_table

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TokenResult(Shown):
    """Pairs taken apart into tokens.

    Args:
        probe: the run that they are from.
        tokens: one row per token: index (of the pair), side, position (in its response), token (its id), text,
            shared (`prefix`, `suffix` or empty: whether the responses have it in common there), logp,
            along_chosen and along_rejected (products of its score with g_w and g_l), share (of c, signed: a side's
            shares sum to 1), and change_<loss> for every loss of the run (first-order change of its log-prob in
            nats per unit of learning rate in the run's metric, on the pair's own loss; a side's sum to the side's).
        loss: the loss that tables show the changes of.
        matrices: token-by-token cosines `(T_w, T_l)` by index of the pair, where asked for.
        notes: what the user should know about how the numbers came about.
    """

    probe: ProbeResult
    tokens: pd.DataFrame
    loss: str
    matrices: dict[int, np.ndarray]
    notes: tuple[str, ...] = ()

    def renderable(self, rows: int = 8) -> RenderableType:
        """Per pair, the `rows` tokens of each side that add most to the entanglement."""
        wanted = list(dict.fromkeys(self.tokens["index"]))
        predictions = self.probe.predictions
        numbers = self.probe.pairs.merge(predictions[predictions["loss"] == self.loss], on="index")
        by_index = {row["index"]: row for row in numbers.to_dict("records")}
        return Group(
            heading(self.probe.summary, self.probe.provenance),
            *(
                token_table(by_index[i], self.tokens[self.tokens["index"] == i], self.loss, rows)
                for i in wanted
            ),
        )


def run_tokens(config: TokensConfig, console: Console | None = None) -> TokenResult:
    """Take pairs of a finished probe apart into tokens, and write what was found into its folder.

    An earlier `tokens.parquet` is replaced.

    Args:
        config: the options.
        console: where notes go; standard error by default.

    Raises:
        UserError: the run isn't a finished probe, its model or data has changed, or a pair or loss isn't in it.
    """
    out = notes_console(console)
    probe = ProbeResult.load(config.run)
    labels = _labels(probe, config)
    indices = _indices(probe, config, labels)
    options = options_of(probe.folder)
    policy, pairs = load_again(probe.folder, options, indices)
    if config.dtype is not None:
        nn.Module.to(policy.model, DTYPES[config.dtype])
    metric = metric_again(options, policy)
    make_engine(policy.model, policy.parameters, "autograd").check(policy.collate(extremes(pairs)))
    found, matrices, notes = [], {}, []
    for pair in pairs:
        products = _products(policy, pair, probe, config, metric)
        notes += products.notes
        found.append(token_rows(pair, products, policy.tokenizer, probe.predictions))
        if products.cosines is not None:
            matrices[pair.index] = products.cosines.numpy()
    result = TokenResult(
        probe, pd.concat(found, ignore_index=True), labels[0], matrices, tuple(dict.fromkeys(notes))
    )
    for note in result.notes:
        out.print(f"Note: {note}", markup=False)
    _write(result)
    return result


def token_rows(
    pair: TokenizedPair,
    products: TokenProducts,
    tokenizer: PreTrainedTokenizerBase,
    predictions: pd.DataFrame,
) -> pd.DataFrame:
    """The tokens of a pair, chosen ones first, with the columns of `TokenResult.tokens`.

    Args:
        pair: the pair.
        products: of its tokens.
        tokenizer: turns tokens into text.
        predictions: the probe's rows, for the incentives of every loss.
    """
    mine = predictions[predictions["index"] == pair.index]
    changes = {
        f"change_{row['loss']}": products.changes(row["incentive_chosen"], row["incentive_rejected"])
        for row in mine.to_dict("records")
    }
    inner = products.geometry.inner
    parts = []
    for i, side in enumerate((products.chosen, products.rejected)):
        ids = side.ids.tolist()
        other = side.along_rejected if i == 0 else side.along_chosen
        parts.append(
            pd.DataFrame(
                {
                    "index": pair.index,
                    "side": SIDES[i],
                    "position": range(len(ids)),
                    "token": ids,
                    "text": [token_text(tokenizer, token) for token in ids],
                    "shared": _shared(len(ids), products.shared_prefix, products.shared_suffix),
                    "logp": side.logps.numpy(),
                    "along_chosen": side.along_chosen.numpy(),
                    "along_rejected": side.along_rejected.numpy(),
                    "share": (other / inner).numpy(),
                }
                | {name: change[i].numpy() for name, change in changes.items()}
            )
        )
    return pd.concat(parts, ignore_index=True)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text; the tokenizer's own name for it where it is only a part of a character."""
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    name = str(tokenizer.convert_ids_to_tokens(token))
    return name if "\ufffd" in text or not text else f" {text}" if name.startswith("\u2581") else text


def _shared(count: int, prefix: int, suffix: int) -> list[str]:
    return ["prefix"] * prefix + [""] * (count - prefix - suffix) + ["suffix"] * suffix


def _products(
    policy: Policy, pair: TokenizedPair, probe: ProbeResult, config: TokensConfig, metric: Metric | None
) -> TokenProducts:
    """Products of one pair; the prompt isn't shared where that doesn't give the probe's own log-probs."""
    batch = policy.collate([pair])

    def products_of(share_prompt: bool) -> TokenProducts:
        with KeepFloat64() if config.dtype == "float64" else nullcontext():
            return token_products(
                policy.model,
                policy.parameters,
                batch,
                full=config.matrix,
                share_prompt=share_prompt,
                metric=metric,
            )

    products = products_of(share_prompt=True)
    row = probe.pairs.set_index("index").loc[pair.index]
    expected = torch.tensor([row["logps_chosen"], row["logps_rejected"]], dtype=torch.float64)
    if logps_agree(_logps(products), expected, products.geometry.resolution):
        return products
    products = products_of(share_prompt=False)
    if not logps_agree(_logps(products), expected, products.geometry.resolution):
        found = _logps(products).tolist()
        note = f"Pair {pair.index}: log-probs {found} now, {expected.tolist()} in the probe's precision."
        return replace(products, notes=(*products.notes, note))
    return products


def _logps(products: TokenProducts) -> Tensor:
    return torch.stack([products.chosen.logps.sum(), products.rejected.logps.sum()])


def _write(result: TokenResult) -> None:
    run = result.probe.folder
    if result.matrices:
        from entangle.figures.tokens import write_heat_maps

        pairs = result.probe.pairs
        cosines = dict(zip(pairs["index"].tolist(), pairs["cosine"].tolist(), strict=True))
        write_heat_maps(result.matrices, result.tokens, cosines, run.path / "tokens")
    run.write_table("tokens.parquet", result.tokens)


# --- what is asked for, and whether it is still there ---------------------------------------------------------


def command(config: TokensConfig, console: Console | None = None) -> Output:
    """`entangle tokens`."""
    result = run_tokens(config, console)
    return Output(result.renderable(config.rows), f"Tokens: {result.probe.folder.path / 'tokens.parquet'}")


def _labels(probe: ProbeResult, config: TokensConfig) -> list[str]:
    """Labels of the losses asked for, all of them in the run; by default the run's first."""
    known = list(dict.fromkeys(probe.predictions["loss"]))
    if not known:
        raise RunError(f"No pair of {probe.folder.path} could be scored, so there is nothing to take apart.")
    labels = [loss.label for loss in build_losses(config.losses)] or known[:1]
    missing = [label for label in labels if label not in known]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} isn't among the losses of {probe.folder.path}: {', '.join(known)}. Probe with it "
            "first."
        )
    return labels


def _indices(probe: ProbeResult, config: TokensConfig, labels: Sequence[str]) -> list[int]:
    """The pairs asked for: those named, or each loss's worst ones."""
    if config.pairs:
        known = probe.pairs.set_index("index")
        absent = [index for index in config.pairs if index not in known.index]
        if absent:
            raise ConfigError(
                f"Pair {', '.join(map(str, absent))} isn't in {probe.folder.path}: its {len(known)} pairs have indices "
                f"{known.index.min()} to {known.index.max()}."
            )
        unscored = [index for index in config.pairs if not is_scored(known.loc[[index]]).item()]
        if unscored:
            raise ConfigError(
                f"Pair {', '.join(map(str, unscored))} has no scores in {probe.folder.path}: it is dropped, empty or "
                "not finite (see the columns of its row). Name other pairs."
            )
        return list(dict.fromkeys(config.pairs))
    worst = [
        int(index)
        for label in labels
        for index in worst_pairs(probe.pairs, probe.predictions, label, config.worst)["index"]
    ]
    if not worst:
        raise ConfigError(
            f"No pair's chosen log-prob falls under {', '.join(labels)} in {probe.folder.path}. "
            "Name the pairs that you want to see: --pairs 0 1."
        )
    return list(dict.fromkeys(worst))
