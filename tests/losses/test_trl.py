"""Losses against TRL's own code: its trainers' methods, unbound, on log-probs that stand in for a model's.

The stand-in model returns given per-token log-probs, so everything between them and the loss is TRL's:
sums, lengths, weights, divergences, batch means. Float32, as TRL computes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import (
    AOT,
    CPO,
    CPOIPO,
    DPO,
    FDPOJS,
    IPO,
    KTO,
    LDDPO,
    ORPO,
    WPO,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BCOPair,
    CPOHinge,
    DiscoPOP,
    EXOPair,
    FDPOAlpha,
    FDPOForwardKL,
    Hinge,
    IPOAverage,
    NCAPair,
    PairLogps,
    PreferenceLoss,
    Robust,
    SFTBatch,
    SigmoidNorm,
    SimPO,
    SPPOHard,
    TokenLogps,
    WeightedSum,
    WithSFT,
)
from tests.losses.cases import label, token_batch

trl = pytest.importorskip("trl", reason="TRL isn't installed")

DPO_OPTIONS = {
    "beta": 0.1,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "use_weighting": False,
    "aux_loss_enabled": False,
    "precompute_ref_logps": True,
}

IN_DPO_TRAINER = [
    (DPO(beta=0.3), {"beta": 0.3}),
    (Hinge(beta=0.3), {"beta": 0.3}),
    (IPOAverage(tau=0.3), {"beta": 0.3}),
    (Robust(label_smoothing=0.2), {"label_smoothing": 0.2}),
    (EXOPair(beta=0.3, label_smoothing=0.01), {"beta": 0.3, "label_smoothing": 0.01}),
    (NCAPair(beta=0.3), {"beta": 0.3}),
    (BCOPair(beta=0.3), {"beta": 0.3}),
    (SPPOHard(beta=0.02), {"beta": 0.02}),
    (AOT(beta=0.3, label_smoothing=0.1), {"beta": 0.3, "label_smoothing": 0.1}),
    (AOTUnpaired(beta=0.3, label_smoothing=0.1), {"beta": 0.3, "label_smoothing": 0.1}),
    (APOZero(beta=0.3), {"beta": 0.3}),
    (APODown(beta=0.3), {"beta": 0.3}),
    (DiscoPOP(beta=0.3, tau=0.2), {"beta": 0.3, "discopop_tau": 0.2}),
    (SigmoidNorm(beta=3.0), {"beta": 3.0}),
    (SFTBatch(), {}),
    (FDPOForwardKL(beta=0.3), {"beta": 0.3, "f_divergence_type": "forward_kl"}),
    (FDPOJS(beta=0.3), {"beta": 0.3, "f_divergence_type": "js_divergence"}),
    (
        FDPOAlpha(beta=0.3, alpha=0.4),
        {"beta": 0.3, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
    ),
    (LDDPO(beta=0.3, alpha=0.4), {"beta": 0.3, "ld_alpha": 0.4}),
    (WPO(beta=0.3, max_weight=float("inf")), {"beta": 0.3, "use_weighting": True}),
    (WeightedSum(), {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    (WithSFT(DPO(), 0.7, SFTBatch()), {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
]
"""A loss, and what makes DPOTrainer compute it (its `loss_type` is the loss's own `trl`)."""


class _Model(torch.nn.Module):
    """Returns given per-token log-probs, `(rows, T)`, and zeros for what TRL only logs."""

    def __init__(self, logps: Tensor, log_collision: Tensor | None = None) -> None:
        super().__init__()
        self.outputs = SimpleNamespace(
            log_probs=logps,
            log_sum_sq_probs=log_collision,
            entropy=torch.zeros_like(logps),
            mean_logits=torch.zeros_like(logps),
            is_top1=torch.zeros_like(logps, dtype=torch.bool),
        )

    def forward(self, **_: Any) -> SimpleNamespace:
        return self.outputs


class _Accelerator(SimpleNamespace):
    """One process on the CPU."""

    device = torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather


def _two_sides(tokens: TokenLogps, column: str) -> Tensor:
    """Chosen rows on rejected rows, `(2B, T)`."""
    return torch.cat([getattr(tokens, column.format("chosen")), getattr(tokens, column.format("rejected"))])


def _inputs(tokens: TokenLogps) -> dict[str, Tensor]:
    """A collated batch of TRL: one prompt token (which isn't scored), then the completions."""
    mask = _two_sides(tokens, "mask_{}").long()
    completion = torch.nn.functional.pad(mask, (1, 0))
    return {
        "input_ids": torch.zeros_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
    }


def _reference(batch: PairLogps, alpha: float | None) -> dict[str, Tensor]:
    """Precomputed reference log-probs; TRL reweighs them too when it has an ld_alpha."""
    if alpha is None:
        return {"ref_chosen_logps": batch.ref_chosen, "ref_rejected_logps": batch.ref_rejected}  # pyright: ignore
    tokens = batch.by_token
    public = torch.minimum(batch.length_chosen, batch.length_rejected)[:, None]
    sums = {}
    for side in ("chosen", "rejected"):
        mask = getattr(tokens, f"mask_{side}").long()
        weight = (mask.cumsum(1) <= public) + alpha * (mask.cumsum(1) > public)
        sums[f"ref_{side}_logps"] = (getattr(tokens, f"ref_{side}") * mask * weight).sum(1)
    return sums


def _batch() -> PairLogps:
    return token_batch(0.5, seed=2, dtype=torch.float32)


def _compare(loss: PreferenceLoss, batch: PairLogps, theirs: Tensor, leaf: Tensor) -> None:
    """The batch mean and its gradient per token, relative to the largest gradient."""
    torch.testing.assert_close(theirs.detach(), loss.per_pair(batch).mean(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(theirs, leaf)
    incentives, tokens = loss.incentives(batch), batch.by_token
    chosen, rejected = incentives.chosen, incentives.rejected
    if not loss.needs_tokens:
        chosen, rejected = chosen[:, None] * tokens.mask_chosen, rejected[:, None] * tokens.mask_rejected
    expected = torch.cat([-chosen, rejected]) / len(chosen)
    scale = expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize(("loss", "options"), IN_DPO_TRAINER, ids=label)
def test_dpo_trainer(loss: PreferenceLoss, options: dict[str, Any]) -> None:
    batch = _batch()
    leaf = _two_sides(batch.by_token, "{}").requires_grad_()
    trl_name = str(loss.trl).partition(",")[0]
    settings = DPO_OPTIONS | {"loss_types": [trl_name], "loss_weights": [1.0]} | options
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=_Accelerator(),
        args=SimpleNamespace(discopop_tau=settings.pop("discopop_tau", 0.05)),
        _metrics={"eval": _Metrics()},
        _total_train_tokens=0,
        **settings,
    )
    inputs = _inputs(batch.by_token) | _reference(batch, settings["ld_alpha"])
    scored = inputs["completion_mask"][:, 1:]
    model = _Model(leaf * scored, _two_sides(batch.by_token, "log_collision_{}"))
    theirs = trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    _compare(loss, batch, theirs, leaf)


class _Metrics(dict):
    """TRL's defaultdict of lists, whatever key it asks for."""

    def __missing__(self, key: str) -> list:
        return self.setdefault(key, [])


def test_ipo_of_trl_is_not_the_summed_one() -> None:
    """Why `ipo` and `ipo_avg` are two names."""
    batch = _batch()
    assert IPOAverage.trl == "ipo" and IPO.trl is None
    assert not torch.allclose(IPO().per_pair(batch), IPOAverage().per_pair(batch))


@pytest.mark.parametrize(
    ("loss", "options", "is_mean"),
    [
        (CPO(beta=0.3, nll_weight=0.0), {"beta": 0.3, "loss_type": "sigmoid"}, False),
        (CPOHinge(beta=0.3, nll_weight=0.0), {"beta": 0.3, "loss_type": "hinge"}, False),
        (CPOIPO(tau=0.3, nll_weight=0.0), {"beta": 0.3, "loss_type": "ipo"}, True),
        (SimPO(beta=1.5, gamma=0.6), {"beta": 1.5, "loss_type": "simpo", "simpo_gamma": 0.6}, True),
        (
            AlphaPO(beta=1.5, gamma=0.6, alpha=0.3),
            {"beta": 1.5, "loss_type": "simpo", "simpo_gamma": 0.6, "alpha": 0.3},
            True,
        ),
    ],
    ids=label,
)
def test_cpo_trainer(loss: PreferenceLoss, options: dict[str, Any], is_mean: bool) -> None:
    """TRL averages the log-probs of simpo and ipo before `cpo_loss`; its NLL term is added outside of it."""
    cpo = pytest.importorskip("trl.experimental.cpo", reason="this TRL has no CPO trainer")
    batch = _batch()
    leaf = _two_sides(batch.by_token, "{}").requires_grad_()
    sums = (leaf * _two_sides(batch.by_token, "mask_{}")).sum(1)
    lengths = torch.cat([batch.length_chosen, batch.length_rejected])
    chosen, rejected = (sums / lengths if is_mean else sums).chunk(2)
    settings = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5} | options
    trainer = SimpleNamespace(accelerator=_Accelerator(), **settings)
    theirs, *_ = cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)
    _compare(loss, batch, theirs.mean(), leaf)


def test_orpo_trainer() -> None:
    """The odds term; TRL's NLL over prompt and response tokens isn't ours, which is subtracted."""
    orpo = pytest.importorskip("trl.experimental.orpo", reason="this TRL has no ORPO trainer")
    batch, loss = _batch(), ORPO(odds_weight=0.3)
    leaf = _two_sides(batch.by_token, "{}").requires_grad_()
    sums = (leaf * _two_sides(batch.by_token, "mask_{}")).sum(1)
    chosen, rejected = (sums / torch.cat([batch.length_chosen, batch.length_rejected])).chunk(2)
    trainer = SimpleNamespace(accelerator=_Accelerator(), beta=0.3)
    odds, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    _compare(loss, batch, (-chosen - odds).mean(), leaf)


@pytest.mark.parametrize(
    ("loss", "loss_type", "reference_point"),
    [
        (KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, reference_point=0.8), "kto", 0.8),
        (KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, reference_point=0.0), "kto", -0.4),
        (APOZero(beta=0.3), "apo_zero_unpaired", None),
    ],
    ids=label,
)
def test_kto_trainer(loss: PreferenceLoss, loss_type: str, reference_point: float | None) -> None:
    """TRL's mean runs over 2B responses, ours over B pairs: a factor of two. Its KL is floored at zero."""
    batch = _batch()
    leaf = _two_sides(batch.by_token, "{}").requires_grad_()
    config = loss.config
    kl = torch.tensor([0.0 if reference_point is None else reference_point])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=_Accelerator(),
        loss_type=loss_type,
        beta=config["beta"],
        desirable_weight=config.get("desirable_weight", 1.0),
        undesirable_weight=config.get("undesirable_weight", 1.0),
        calculate_KL=reference_point is not None,
        _compute_kl_logps=lambda model, batch: kl,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"eval": _Metrics()},
        _total_train_tokens=0,
    )
    inputs = _inputs(batch.by_token) | {
        "label": torch.tensor([True] * 9 + [False] * 9),
        "ref_logps": torch.cat(list(_reference(batch, None).values())),
        "ref_KL_logps": torch.zeros(1),
    }
    model = _Model(leaf * _inputs(batch.by_token)["completion_mask"][:, 1:])
    theirs = trl.KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    _compare(loss, batch, 2 * theirs, leaf)
