"""Every loss of the catalogue at two settings, and batches that reach both sides of every kink."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from losses import CATALOGUE, PairLogps, PreferenceLoss, TokenLogps, build

OTHER_SETTINGS: dict[str, dict] = {
    "cdpo": {"beta": 0.3, "label_smoothing": 0.1},
    "robust": {"beta": 0.3, "label_smoothing": 0.3},
    "exo_pair": {"beta": 0.3, "label_smoothing": 0.1},
    "discopop": {"beta": 0.2, "tau": 0.4},
    "dpo_shift": {"beta": 0.3, "shift": 0.5},
    "kto": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5, "reference_point": 0.7},
    "bco": {"beta": 0.3, "shift": 0.4},
    "aot": {"beta": 0.3, "label_smoothing": 0.2},
    "aot_unpaired": {"beta": 0.3, "label_smoothing": 0.2},
    "f_dpo_alpha": {"beta": 0.3, "alpha": 1.5},
    "mappo": {"beta": 0.3, "score_gap": 0.9},
    "ld_dpo": {"beta": 0.3, "alpha": 0.2},
    "wpo": {"beta": 0.3, "max_weight": float("inf")},
    "sppo_hard": {"beta": 0.05},
    "cal_dpo": {"beta": 0.05},
    "weighted_sum": {"losses": ["odpo", {"name": "ld_dpo", "alpha": 0.3}, "sft"], "weights": [0.5, 1.5, 0.2]},
    "with_sft": {"loss": "simpo", "alpha": 0.3, "sft": "sft_sum"},
}
"""A second setting of losses whose hyper-parameters can't simply be scaled."""


def _other(name: str) -> PreferenceLoss:
    default = CATALOGUE[name]()
    numbers = {f.name: getattr(default, f.name) for f in fields(default)}
    scaled = {key: value * 1.7 + 0.01 for key, value in numbers.items() if isinstance(value, float)}
    return build({"name": name} | OTHER_SETTINGS.get(name, scaled))


DEFAULTS: list[PreferenceLoss] = [cls() for cls in CATALOGUE.values()]
LOSSES: list[PreferenceLoss] = [*DEFAULTS, *(_other(name) for name in CATALOGUE if fields(CATALOGUE[name]))]
PAIR_LOSSES = [loss for loss in LOSSES if not loss.needs_tokens]
TOKEN_LOSSES = [loss for loss in LOSSES if loss.needs_tokens]


def label(value: object) -> str | None:
    """Test id of a loss; pytest's own for anything else."""
    return value.label.replace(" ", "") if isinstance(value, PreferenceLoss) else None


def token_batch(
    spread: float, *, seed: int = 0, pairs: int = 9, tokens: int = 12, dtype: torch.dtype = torch.float64
) -> PairLogps:
    """A batch with every column there is; log-ratios of size `spread` per token.

    Chosen rows are padded on the right, rejected ones on the left; padding holds NaN, which nothing may read.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lengths = torch.randint(1, tokens + 1, (2, pairs), generator=generator)
    positions = torch.arange(tokens)
    masks = positions < lengths[0][:, None], positions >= tokens - lengths[1][:, None]

    def columns(mask: Tensor) -> tuple[Tensor, ...]:
        logps = -normal(pairs, tokens).exp() - 0.01
        drift = normal(pairs, 1) * spread  # the same sign along a response: log-ratios add up
        reference = logps - drift - 0.3 * spread * normal(pairs, tokens)
        collision, divergence = -normal(pairs, tokens).exp(), 0.2 * normal(pairs, tokens).exp()
        return tuple(torch.where(mask, c, torch.nan) for c in (logps, reference, collision, divergence))

    chosen, rejected = columns(masks[0]), columns(masks[1])
    return TokenLogps(
        chosen=chosen[0],
        rejected=rejected[0],
        mask_chosen=masks[0],
        mask_rejected=masks[1],
        ref_chosen=chosen[1],
        ref_rejected=rejected[1],
        log_collision_chosen=chosen[2],
        log_collision_rejected=rejected[2],
        kl_chosen=chosen[3],
        kl_rejected=rejected[3],
    ).pairs(score_gap=torch.rand(pairs, generator=generator, dtype=torch.float64).to(dtype))


def reference_point() -> PairLogps:
    """The first step of training: policy = reference, every log-ratio is zero."""
    batch = token_batch(0.5, seed=3)
    tokens = batch.by_token
    return TokenLogps(
        chosen=tokens.chosen,
        rejected=tokens.rejected,
        mask_chosen=tokens.mask_chosen,
        mask_rejected=tokens.mask_rejected,
        ref_chosen=tokens.chosen,
        ref_rejected=tokens.rejected,
        log_collision_chosen=tokens.log_collision_chosen,
        log_collision_rejected=tokens.log_collision_rejected,
        kl_chosen=torch.zeros_like(tokens.chosen),
        kl_rejected=torch.zeros_like(tokens.rejected),
    ).pairs(score_gap=batch.score_gap)


BATCHES = {
    "near": token_batch(0.05, seed=1),
    "middle": token_batch(0.5, seed=2),
    "far": token_batch(6.0, seed=4, pairs=40),
    "reference": reference_point(),
}
"""Float64 batches from the reference point out to log-ratios of a hundred nats."""
