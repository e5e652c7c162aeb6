"""What a loss declares about itself is what it does; losses that should agree do."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import losses
from entangle.analysis.geometry import PairGeometry
from entangle.analysis.regimes import predict
from losses import (
    AOT,
    BCE,
    BCO,
    CATALOGUE,
    CDPO,
    CPO,
    DPO,
    DPOP,
    KTO,
    LDDPO,
    MPO,
    ODPO,
    RDPO,
    RPO,
    SFT,
    TDPO1,
    TDPO2,
    AlphaDPO,
    AlphaPO,
    APOZero,
    BCOPair,
    BetaDPO,
    DPOShift,
    FDPOAlpha,
    MaPPO,
    MissingReference,
    MissingTokens,
    PairLogps,
    PreferenceLoss,
    RePO,
    Robust,
    SigmoidNorm,
    SimPO,
    TokenLogps,
    UnknownLoss,
    WeightedSum,
    WithSFT,
    as_function,
    build,
    register,
)
from tests.losses.cases import BATCHES, DEFAULTS, LOSSES, PAIR_LOSSES, TOKEN_LOSSES, label, token_batch

BATCH = BATCHES["middle"]


def _replaced(batch: PairLogps, **columns: torch.Tensor | None) -> PairLogps:
    """The same batch without tokens and with other columns."""
    return dataclasses.replace(batch, tokens=None, **columns)


# --- declarations


@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_a_missing_reference_is_an_error_iff_the_loss_needs_one(loss: PreferenceLoss) -> None:
    tokens = dataclasses.replace(BATCH.by_token, ref_chosen=None, ref_rejected=None)
    batch = tokens.pairs(score_gap=BATCH.score_gap)
    if loss.needs_reference:
        with pytest.raises(MissingReference, match="reference|ref_chosen"):
            loss.per_pair(batch)
    else:
        torch.testing.assert_close(loss.per_pair(batch), loss.per_pair(BATCH), rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_missing_tokens_are_an_error_iff_the_loss_needs_them(loss: PreferenceLoss) -> None:
    batch = _replaced(BATCH)
    if loss.needs_tokens:
        with pytest.raises(MissingTokens, match="TokenLogps"):
            loss.incentives(batch)
    else:
        assert torch.equal(loss.per_pair(batch), loss.per_pair(BATCH))


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=label)
def test_lengths_matter_iff_the_loss_needs_them(loss: PreferenceLoss) -> None:
    length_chosen, length_rejected = BATCH.length_chosen * 3, BATCH.length_rejected * 2
    longer = _replaced(BATCH, length_chosen=length_chosen, length_rejected=length_rejected)
    assert torch.equal(loss.per_pair(longer), loss.per_pair(BATCH)) == (not loss.needs_lengths)


@pytest.mark.parametrize("loss", DEFAULTS, ids=label)
def test_a_pair_feels_the_others_iff_the_loss_is_batch_coupled(loss: PreferenceLoss) -> None:
    """The last pair is swapped for another one; the incentives of the rest are compared.

    Log-ratios are positive on average, so that KTO's reference point isn't at its floor.
    """
    other = token_batch(5.0, seed=11).by_token
    tokens = BATCH.by_token
    references = {name: tokens.statistic(name) - 1 for name in ("ref_chosen", "ref_rejected")}
    tokens = dataclasses.replace(tokens, **references)
    columns = {f.name: getattr(tokens, f.name).clone() for f in dataclasses.fields(TokenLogps)}
    for name, column in columns.items():
        column[-1] = getattr(other, name)[-1]
    swapped = TokenLogps(**columns).pairs(score_gap=BATCH.score_gap)
    before = loss.incentives(tokens.pairs(score_gap=BATCH.score_gap))
    after = loss.incentives(swapped)
    is_same = all(
        torch.allclose(getattr(before, side)[:-1], getattr(after, side)[:-1], rtol=1e-12, atol=0)
        for side in ("chosen", "rejected")
    )
    assert is_same == (not loss.is_batch_coupled)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if not loss.is_batch_coupled], ids=label)
def test_a_slice_of_the_batch_gives_a_slice_of_the_losses(loss: PreferenceLoss) -> None:
    rows = torch.tensor([4, 1, 7])
    torch.testing.assert_close(loss.per_pair(BATCH[rows]), loss.per_pair(BATCH)[rows], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_the_order_of_the_pairs_does_not_matter(loss: PreferenceLoss) -> None:
    order = torch.tensor([5, 2, 8, 0, 1, 7, 3, 6, 4])
    shuffled, straight = loss.incentives(BATCH[order]), loss.incentives(BATCH)
    torch.testing.assert_close(shuffled.chosen, straight.chosen[order], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(shuffled.rejected, straight.rejected[order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", TOKEN_LOSSES, ids=label)
def test_padding_neither_matters_nor_gets_an_incentive(loss: PreferenceLoss) -> None:
    """Padding holds NaN in every batch here; two more columns of it change nothing."""

    def widened(column: torch.Tensor) -> torch.Tensor:
        return torch.cat([column, torch.zeros_like(column[:, :2])], dim=1)

    tokens = BATCH.by_token
    columns = {f.name: widened(getattr(tokens, f.name)) for f in dataclasses.fields(TokenLogps)}
    wide = TokenLogps(**columns).pairs(score_gap=BATCH.score_gap)
    found, expected = loss.incentives(wide), loss.incentives(BATCH)
    torch.testing.assert_close(found.chosen, widened(expected.chosen), rtol=1e-12, atol=1e-15)
    assert (found.rejected[~columns["mask_rejected"].bool()] == 0).all()


@pytest.mark.parametrize("name", ["log_collision_chosen", "log_collision_rejected"])
def test_a_missing_statistic_is_named(name: str) -> None:
    tokens = dataclasses.replace(BATCH.by_token, **{name: None})
    with pytest.raises(MissingTokens, match=name):
        build("wpo").per_pair(tokens.pairs())


def test_score_gaps_of_the_batch_take_precedence() -> None:
    without = _replaced(BATCH, score_gap=None)
    for loss in (ODPO(score_gap=2.0), MaPPO(score_gap=0.25)):
        constant = _replaced(BATCH, score_gap=torch.full_like(BATCH.chosen, loss.score_gap))
        torch.testing.assert_close(loss.per_pair(without), loss.per_pair(constant), rtol=1e-14, atol=0)
        assert not torch.allclose(loss.per_pair(without), loss.per_pair(BATCH))


def test_score_gaps_out_of_range_are_clamped() -> None:
    gaps = torch.linspace(-1, 2, 9, dtype=torch.float64)
    extreme, clamped = _replaced(BATCH, score_gap=gaps), _replaced(BATCH, score_gap=gaps.clamp(0, 1))
    assert torch.equal(MaPPO().per_pair(extreme), MaPPO().per_pair(clamped))
    positive = _replaced(BATCH, score_gap=gaps.clamp(min=1e-6))
    assert torch.equal(ODPO().per_pair(extreme), ODPO().per_pair(positive))


# --- agreement between losses

ONE_PAIR = BATCH[:1]
EQUAL_LENGTHS = _replaced(
    BATCH, length_chosen=torch.full_like(BATCH.chosen, 7), length_rejected=torch.full_like(BATCH.chosen, 7)
)
NO_REFERENCE = _replaced(
    BATCH, ref_chosen=torch.zeros_like(BATCH.chosen), ref_rejected=torch.zeros_like(BATCH.chosen)
)
SINGLE_TOKENS = dataclasses.replace(
    NO_REFERENCE, length_chosen=torch.ones_like(BATCH.chosen), length_rejected=torch.ones_like(BATCH.chosen)
)
SAME_DISTRIBUTION = dataclasses.replace(
    BATCH.by_token,
    kl_chosen=torch.zeros_like(BATCH.by_token.chosen),
    kl_rejected=torch.zeros_like(BATCH.by_token.rejected),
).pairs()

AGREEMENTS = [
    (Robust(label_smoothing=0.0), DPO(), BATCH),
    (CDPO(label_smoothing=0.0), DPO(), BATCH),
    (RDPO(alpha=0.0), DPO(), BATCH),
    (ODPO(score_gap=1.0), DPO(), _replaced(BATCH, score_gap=None)),
    (DPOP(penalty=0.0), DPO(), BATCH),
    (DPOShift(shift=1.0), DPO(), BATCH),
    (MaPPO(score_gap=0.7), DPOShift(shift=0.7), _replaced(BATCH, score_gap=None)),
    (FDPOAlpha(alpha=1.0), DPO(), BATCH),
    (FDPOAlpha(alpha=1.0 + 1e-9), DPO(), BATCH),
    (LDDPO(alpha=1.0), DPO(), BATCH),
    (TDPO1(), DPO(), SAME_DISTRIBUTION),
    (TDPO2(alpha=0.0), DPO(), BATCH),
    (TDPO2(alpha=1.0), TDPO1(), BATCH),
    (BetaDPO(alpha=0.0), DPO(), BATCH),
    (AOT(beta=0.1), DPO(), ONE_PAIR),
    (CPO(nll_weight=0.0), DPO(), NO_REFERENCE),
    (SimPO(beta=0.1, gamma=0.0), DPO(), SINGLE_TOKENS),
    (SigmoidNorm(beta=0.7), DPO(beta=0.1), EQUAL_LENGTHS),
    (AlphaPO(alpha=0.0), SimPO(), BATCH),
    (AlphaPO(alpha=1e-9), SimPO(), BATCH),
    (AlphaDPO(beta=2.0, gamma_beta_ratio=0.25), SimPO(), ONE_PAIR),
    (WeightedSum((RePO(gamma=0.25),), (1e4,)), SimPO(beta=1e4, gamma=2.5e3), BATCH),
    (BCO(shift=0.0), BCOPair(), BATCH),
    (BCE(), BCOPair(beta=1.0), BATCH),
    (KTO(reference_point=0.0), APOZero(), BATCH),
    (WithSFT(DPO(), alpha=0.3), RPO(alpha=0.3), BATCH),
    (WeightedSum((DPO(), BCOPair(0.1), SFT()), (0.8, 0.2, 1.0)), MPO(), BATCH),
    (WeightedSum(), MPO(), EQUAL_LENGTHS),
    (WeightedSum((DPO(), DPO()), (0.25, 0.75)), DPO(), BATCH),
]
"""Two losses that coincide, and the batch on which they do."""


@pytest.mark.parametrize(
    ("loss", "limit", "batch"), AGREEMENTS, ids=[f"{label(a)}={label(b)}" for a, b, _ in AGREEMENTS]
)
def test_losses_coincide(loss: PreferenceLoss, limit: PreferenceLoss, batch: PairLogps) -> None:
    """Limits taken at 1e-9 leave 1e-7; the others are exact."""
    torch.testing.assert_close(loss.per_pair(batch), limit.per_pair(batch), rtol=1e-6, atol=1e-7)
    found, expected = loss.incentives(batch), limit.incentives(batch)
    if loss.needs_tokens and not limit.needs_tokens:  # the incentive of a sum stands on each token
        mask = batch.by_token.mask_chosen
        torch.testing.assert_close(found.chosen, expected.chosen[:, None] * mask, rtol=1e-6, atol=1e-12)
        return
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.rejected, expected.rejected, rtol=1e-6, atol=1e-12)


def test_tdpo1_pushes_down_the_divergence_that_tdpo2_leaves_alone() -> None:
    """The chosen KL carries gradient in TDPO1 and none in TDPO2; the rejected one in both."""
    tokens = BATCH.by_token
    for loss, has_chosen in ((TDPO1(), True), (TDPO2(), False)):
        kl_chosen = tokens.statistic("kl_chosen").clone().requires_grad_()
        kl_rejected = tokens.statistic("kl_rejected").clone().requires_grad_()
        batch = dataclasses.replace(tokens, kl_chosen=kl_chosen, kl_rejected=kl_rejected).pairs()
        grads = torch.autograd.grad(
            loss.per_pair(batch).sum(), (kl_chosen, kl_rejected), allow_unused=True, materialize_grads=True
        )
        assert bool(grads[0].abs().sum() > 0) == has_chosen
        assert grads[1].abs().sum() > 0


@pytest.mark.parametrize(
    "name", [n for n, cls in CATALOGUE.items() if cls.ratio == "1" and n not in ("wpo", "beta_dpo", "aot")]
)
def test_one_verdict_for_every_beta_of_a_loss_with_ratio_one(name: str) -> None:
    """Losses of the margin have rho = 1: at one model state, regimes can't depend on beta while d > 0."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.2, 6.0, 9, dtype=torch.float64)[:, None]
    geometry = PairGeometry.from_scores(scores[0] * scale, scores[1] + scores[0])
    verdict = predict(geometry, DPO().incentives(BATCH)).regime_codes
    assert len(set(verdict.tolist())) == 3
    strength = "tau" if name == "ipo" else "beta"
    compared = 0
    for value in (0.01, 0.1, 0.5):
        incentives = build({"name": name, strength: value}).incentives(BATCH)
        rising = incentives.chosen > 0
        compared += int(rising.sum())
        assert torch.equal(predict(geometry, incentives).regime_codes[rising], verdict[rising])
    assert compared > 5


# --- objects are configs


@pytest.mark.parametrize("loss", LOSSES, ids=label)
def test_config_survives_json_and_builds_the_same_loss(loss: PreferenceLoss) -> None:
    config = json.loads(json.dumps(loss.config))
    assert build(config) == loss
    assert build(loss) is loss
    assert config["name"] == loss.name


def test_labels_are_unique_and_defaults_are_bare_names() -> None:
    labels = [loss.label for loss in LOSSES]
    assert len(set(labels)) == len(labels)
    assert [loss.label for loss in DEFAULTS] == list(CATALOGUE)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_loss_can_be_imported_by_its_class(name: str) -> None:
    cls = CATALOGUE[name]
    assert getattr(losses, cls.__name__) is cls
    assert cls.__bases__ == (PreferenceLoss,)


def test_trl_option_names_point_at_fields() -> None:
    for cls in CATALOGUE.values():
        assert set(cls.trl_options.values()) <= {f.name for f in dataclasses.fields(cls)}


@pytest.mark.parametrize("spec", ["dop", {"name": "dop"}, {"beta": 0.1}, {}])
def test_an_unknown_name_lists_the_known_ones(spec: str | dict) -> None:
    with pytest.raises(UnknownLoss, match=r"Known losses: .*dpo.*, simpo"):
        build(spec)


def test_an_unknown_hyper_parameter_lists_the_known_ones() -> None:
    with pytest.raises(UnknownLoss, match=r"'gama' of loss 'simpo'. It has: beta, gamma"):
        build({"name": "simpo", "gama": 0.5})
    with pytest.raises(UnknownLoss, match=r"'beta' of loss 'sft'. It has: none"):
        build({"name": "sft", "beta": 0.5})


@pytest.mark.parametrize("name", [loss.name for loss in DEFAULTS if "beta" in loss.config])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(name: str, beta: float) -> None:
    with pytest.raises(ValueError, match=f"'{name}' expects .*beta > 0.*; got {name}"):
        build({"name": name, "beta": beta})


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "ipo", "tau": 0.0},
        {"name": "ipo_avg", "tau": -1.0},
        {"name": "cpo_ipo", "tau": 0.0},
        {"name": "cdpo", "label_smoothing": 0.5},
        {"name": "robust", "label_smoothing": 0.5},
        {"name": "exo_pair", "label_smoothing": 0.0},
        {"name": "aot", "label_smoothing": -0.1},
        {"name": "aot_unpaired", "label_smoothing": 0.6},
        {"name": "discopop", "tau": 1.0},
        {"name": "odpo", "score_gap": 0.0},
        {"name": "mappo", "score_gap": 1.1},
        {"name": "dpop", "penalty": -1.0},
        {"name": "dpo_shift", "shift": 0.0},
        {"name": "rpo", "alpha": -0.1},
        {"name": "cpo", "nll_weight": -0.1},
        {"name": "cpo_hinge", "nll_weight": -0.1},
        {"name": "slic", "nll_weight": -0.1},
        {"name": "rrhf", "nll_weight": -0.1},
        {"name": "orpo", "odds_weight": -0.1},
        {"name": "ld_dpo", "alpha": 1.1},
        {"name": "wpo", "max_weight": 0.0},
        {"name": "with_sft", "alpha": -1.0},
        {"name": "with_sft", "sft": "dpo"},
        {"name": "weighted_sum", "losses": ["dpo"], "weights": [1.0, 2.0]},
        {"name": "weighted_sum", "losses": [], "weights": []},
    ],
    ids=lambda spec: " ".join(map(str, spec.values())),
)
def test_nonsense_is_refused_with_what_was_expected(spec: dict) -> None:
    with pytest.raises(ValueError, match=f"'{spec['name']}' expects"):
        build(spec)


def test_an_unknown_part_of_a_sum_is_named() -> None:
    with pytest.raises(UnknownLoss, match="'dop'"):
        WeightedSum(("dop",), (1.0,))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["", "dpo", "DPO", "d po"])
def test_register_refuses_a_bad_or_taken_name(name: str) -> None:
    before = dict(CATALOGUE)
    with pytest.raises(ValueError, match="new lower-case name"):
        register(type("Another", (PreferenceLoss,), {"name": name}))
    assert before == CATALOGUE


# --- the boundary


@pytest.mark.parametrize("column", [f.name for f in dataclasses.fields(PairLogps) if f.name != "tokens"])
def test_a_column_of_another_shape_is_refused_by_name(column: str) -> None:
    """(4,) against (4, 1) would broadcast to (4, 4) in silence."""
    batch = _replaced(BATCH)
    with pytest.raises(ValueError, match=rf"one shape \(B,\); got .*'{column}': \(9, 1\)"):
        dataclasses.replace(batch, **{column: getattr(batch, column)[:, None]})


def test_tokens_of_another_batch_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'tokens': \(2,\)"):
        dataclasses.replace(BATCH, tokens=BATCH.by_token[:2])


def test_one_reference_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="both ref_chosen and ref_rejected.*only ref_chosen"):
        _replaced(BATCH, ref_rejected=None)


@pytest.mark.parametrize("column", [f.name for f in dataclasses.fields(TokenLogps)])
def test_token_columns_of_another_shape_are_refused_by_name(column: str) -> None:
    tokens = BATCH.by_token
    with pytest.raises(ValueError, match=r"one side must share one shape|as many chosen as rejected"):
        dataclasses.replace(tokens, **{column: getattr(tokens, column)[:, :-1]})


def test_sides_of_a_token_batch_may_differ_in_width_but_not_in_rows() -> None:
    tokens = BATCH.by_token
    names = [f.name for f in dataclasses.fields(TokenLogps) if "rejected" in f.name]
    rejected = {name: getattr(tokens, name)[:4] for name in names}
    with pytest.raises(ValueError, match="got 9 and 4"):
        dataclasses.replace(tokens, **rejected)


def test_token_sums_are_the_pairs() -> None:
    tokens = BATCH.by_token
    expected = [row[mask].sum() for row, mask in zip(tokens.chosen, tokens.mask_chosen, strict=True)]
    torch.testing.assert_close(BATCH.chosen, torch.stack(expected))
    assert BATCH.length_chosen.tolist() == tokens.mask_chosen.sum(1).tolist()


# --- as_function


@pytest.mark.parametrize("loss", PAIR_LOSSES, ids=label)
def test_as_function_is_the_loss(loss: PreferenceLoss) -> None:
    batch = _replaced(BATCH, score_gap=None)
    columns = (batch.chosen, batch.rejected, batch.ref_chosen, batch.ref_rejected)
    values, chosen, rejected = as_function(loss)(*columns, batch.length_chosen, batch.length_rejected)
    assert torch.equal(values, loss.per_pair(batch))
    beta = loss.config.get("beta", 1.0)
    torch.testing.assert_close(chosen, beta * batch.logratio_chosen)
    torch.testing.assert_close(rejected, beta * batch.logratio_rejected)


def test_as_function_keeps_the_graph_of_losses_and_detaches_rewards() -> None:
    chosen = BATCH.chosen.clone().requires_grad_()
    values, rewards, _ = as_function(DPO())(chosen, BATCH.rejected, BATCH.ref_chosen, BATCH.ref_rejected)
    assert values.requires_grad and not rewards.requires_grad


def test_as_function_without_reference_rewards_log_probs() -> None:
    values, chosen, _ = as_function(CPO(beta=0.2))(BATCH.chosen, BATCH.rejected)
    torch.testing.assert_close(chosen, 0.2 * BATCH.chosen)
    assert torch.equal(values, CPO(beta=0.2).per_pair(BATCH))


def test_as_function_says_what_is_missing() -> None:
    with pytest.raises(MissingReference):
        as_function(DPO())(BATCH.chosen, BATCH.rejected)
    with pytest.raises(ValueError, match="simpo reads lengths_chosen and lengths_rejected"):
        as_function(SimPO())(BATCH.chosen, BATCH.rejected)
    with pytest.raises(ValueError, match="ld_dpo weighs tokens"):
        as_function(LDDPO())
