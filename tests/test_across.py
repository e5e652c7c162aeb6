"""Entanglement across pairs: against the whole Gram matrix, against a real step on all pairs, and as a command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from entangle.analysis.geometry import SIDES
from entangle.analysis.regimes import Regime
from entangle.cli import main
from entangle.commands.across import PARTS, Across, AcrossResult, run_across, set_block
from entangle.commands.probe import run_probe
from entangle.config import AcrossConfig, ProbeConfig
from entangle.data import load_pairs, tokenize_pair
from entangle.measure.inputs import load_policy_of
from entangle.measure.verification import KeepFloat64
from entangle.scores import make_engine, row_logps, score_gram
from tests.tiny import gpt2_tokenizer, save_adapter, save_policy

PAIRS = [
    {"prompt": "TL;DR:", "chosen": " the cat sat on the mat", "rejected": " the other cat sat on the mat"},
    {"prompt": "TL;DR: they said", "chosen": " the sum is four", "rejected": " the sum is five"},
    {"prompt": "the cat sat " * 40, "chosen": " the cat", "rejected": " they"},  # longer than max_length
    {"prompt": "the cat sat", "chosen": " on the mat", "rejected": " they think"},
    {"prompt": "she said", "chosen": " they think", "rejected": " they think the other thing"},
]
SCORED = (0, 1, 3, 4)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ProbeConfig:
    """A finished probe of four pairs and one that can't be scored; incentives differ between the pairs."""
    folder = tmp_path_factory.mktemp("across")
    base = save_policy(folder / "base", gpt2_tokenizer())
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    config = ProbeConfig(
        model_name_or_path=base, adapter_name_or_path=save_adapter(folder / "adapter", base), dtype="float64",
        dataset_name=str(folder / "rows.jsonl"), losses=("dpo", "cpo"), max_length=64, output_dir=str(folder / "run"),
    )  # fmt: skip
    run_probe(config, Console(quiet=True))
    return config


@pytest.fixture(scope="module")
def result(options: ProbeConfig) -> AcrossResult:
    return measure(options)


def measure(options: ProbeConfig, **asked) -> AcrossResult:
    return run_across(AcrossConfig(run=str(options.output_dir), plots=False, **asked), Console(quiet=True))


def whole_gram(options: ProbeConfig) -> np.ndarray:
    """All products of all scored pairs' scores: chosen rows, then rejected rows."""
    policy = load_policy_of(options)
    pairs = [
        tokenize_pair(policy.tokenizer, pair, options.max_length) for pair in load_pairs(options.dataset_name)
    ]
    batch = policy.collate([pairs[i] for i in SCORED])
    return score_gram(make_engine(policy.model, policy.parameters), [batch]).numpy()


def test_parts_are_sums_over_the_gram_matrix(options, result):
    gram, n = whole_gram(options), len(SCORED)
    for loss in ("dpo", "cpo"):
        rows = result.rows[result.rows["loss"] == loss].set_index("index")
        assert tuple(rows.index) == SCORED
        own = result.probe.predictions.query("loss == @loss").set_index("index").loc[list(SCORED)]
        d_w, d_l = own["incentive_chosen"].to_numpy(), own["incentive_rejected"].to_numpy()
        for k, side in enumerate(SIDES):
            by_chosen, by_rejected = gram[k * n : (k + 1) * n, :n] * d_w, -gram[k * n : (k + 1) * n, n:] * d_l
            at_home = np.diag(by_chosen), np.diag(by_rejected)
            others = [
                (m.sum(1) - home) / (n - 1) for m, home in zip((by_chosen, by_rejected), at_home, strict=True)
            ]
            found = {part: rows[f"{part}_{side}"].to_numpy() for part in PARTS}
            np.testing.assert_allclose(found["pull"], others[0], rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(found["push"], others[1], rtol=1e-8, atol=1e-9)
            np.testing.assert_allclose(found["own"], at_home[k], rtol=1e-8)
            np.testing.assert_allclose(found["partner"], at_home[1 - k], rtol=1e-8, atol=1e-9)
            mean = result.summary["losses"][loss][side]
            assert mean["change"] == pytest.approx((by_chosen + by_rejected).sum(1).mean(), rel=1e-8)
            assert mean["change"] == pytest.approx(sum(mean[part] for part in PARTS), rel=1e-8)


@pytest.mark.parametrize("loss", ["dpo", "cpo"])
def test_a_real_step_on_all_pairs_confirms_it(options, result, loss):
    """An epoch of one batch: change = lr / N times the sum of the parts, to first order."""
    policy = load_policy_of(options)
    pairs = [
        tokenize_pair(policy.tokenizer, pair, options.max_length) for pair in load_pairs(options.dataset_name)
    ]
    batch = policy.collate([pairs[i] for i in SCORED])
    n, rate = len(SCORED), 1e-6
    with KeepFloat64():
        before = row_logps(policy.model, batch)
    own = result.probe.predictions.query("loss == @loss").set_index("index").loc[list(SCORED)]
    push = np.concatenate([own["incentive_chosen"], -own["incentive_rejected"]]) / n
    scores = make_engine(policy.model, policy.parameters, "autograd").scores(batch)
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            parameter += rate * (torch.from_numpy(push).to(parameter) @ scores[name]).view_as(parameter)
    with KeepFloat64():
        moved = (row_logps(policy.model, batch) - before).view(2, n) * n / rate
    rows = result.rows[result.rows["loss"] == loss]
    for k, side in enumerate(SIDES):
        np.testing.assert_allclose(moved[k].numpy(), rows[f"epoch_{side}"], rtol=2e-4)
        signs = np.sign(rows[f"epoch_{side}"].to_numpy())
        up = rows["epoch_regime"].isin(
            [Regime.IDEAL, Regime.BOTH_UP] if side == "chosen" else [Regime.BOTH_UP, Regime.INVERTED]
        )
        np.testing.assert_array_equal(signs > 0, up)


def test_a_longer_epoch_has_more_others(options, result):
    longer = measure(options, epoch_pairs=101, losses=("cpo",))
    assert list(longer.summary["losses"]) == ["cpo"]
    short, long = (each.summary["losses"]["cpo"]["chosen"] for each in (result, longer))
    assert long["own"] == pytest.approx(short["own"]) and long["pull"] == pytest.approx(
        100 / 3 * short["pull"]
    )


def test_fewer_pairs_are_spread_over_the_run(options):
    assert measure(options, limit=2).rows["index"].unique().tolist() == [0, 4]


def test_the_set_is_estimated_without_bias_and_its_errors_are_the_jackknifes():
    """U-statistics over i != j; leaving out one pair at a time gives their standard errors."""
    torch.manual_seed(1)
    n, chosen, rejected = 60, torch.randn(60, 5).double() + 0.4, torch.randn(60, 5).double() + 0.5

    def block(keep: torch.Tensor) -> dict:
        up, down = chosen[keep], rejected[keep]
        own = torch.stack([(up * up).sum(1), (up * down).sum(1), (down * down).sum(1)])
        rows = torch.stack([up, down], 1)
        return set_block(own, rows @ torch.stack([up.mean(0), down.mean(0)], 1))

    found, everyone = block(torch.arange(n)), torch.arange(n)
    apart = ~torch.eye(n, dtype=torch.bool)
    for name, products in (
        ("sq_chosen", chosen @ chosen.T), ("inner", chosen @ rejected.T), ("sq_rejected", rejected @ rejected.T),
    ):  # fmt: skip
        assert found[name] == pytest.approx(float(products[apart].mean()))
        left_out = np.array([block(everyone[everyone != i])[name] for i in range(n)])
        jackknife = ((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum()) ** 0.5
        assert found[f"{name}_error"] == pytest.approx(jackknife, rel=0.05)
    assert found["band"] == pytest.approx(
        [found["inner"] / found["sq_chosen"], found["sq_rejected"] / found["inner"]]
    )


@pytest.mark.parametrize("side", SIDES)
def test_errors_of_a_loss_are_the_jackknifes(side: str):
    """What the others do, and the whole change, under incentives that differ between the pairs."""
    torch.manual_seed(2)
    n, scores = 60, torch.randn(60, 2, 5).double() + torch.tensor([[0.4], [0.5]]).double()
    incentives = torch.rand(2, n).double() + 0.5

    def summary(keep: torch.Tensor) -> dict:
        rows, (d_w, d_l) = scores[keep], incentives[:, keep]
        block = torch.stack([(rows[:, a] * rows[:, b]).sum(1) for a, b in ((0, 0), (0, 1), (1, 1))])
        moved = torch.stack([(d_w[:, None] * rows[:, 0]).mean(0), (d_l[:, None] * rows[:, 1]).mean(0)], 1)
        return Across("dpo", d_w, d_l, block, rows @ moved, rows @ rows.mean(0).T, 40).summary()[side]

    everyone = torch.arange(n)
    found, left_out = summary(everyone), [summary(everyone[everyone != i]) for i in range(n)]
    for name, error in (("others", "others_error"), ("change", "error")):
        values = np.array([each[name] for each in left_out])
        jackknife = ((n - 1) / n * ((values - values.mean()) ** 2).sum()) ** 0.5
        assert found[error] == pytest.approx(jackknife, rel=0.05)
    assert found["others"] == pytest.approx(found["pull"] + found["push"])


def test_a_set_without_a_common_direction_has_no_band():
    own = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).double()
    block = set_block(own, torch.zeros(2, 2, 2).double())
    assert block["sq_chosen"] < 0 and np.isnan(block["band"]).all() and np.isnan(block["cosine"])


def test_command_writes_and_says_what_it_found(options, capsys):
    run = Path(str(options.output_dir))
    assert main(["across", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "Under dpo an epoch's first-order effect" in shown and "cpo" in shown
    assert (run / "across.parquet").is_file() and (run / "across.png").stat().st_size > 10_000
    assert json.loads((run / "across.json").read_text())["pairs"] == len(SCORED)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected the run folder of a finished probe"),
        (("RUN", "--losses", "simpo"), "simpo isn't among the losses"),
        (("RUN", "--limit", "1"), "limit must be at least 2; got 1"),
        (("nowhere",), "nowhere"),
    ],
)
def test_refusals(options, capsys, arguments, said):
    words = [str(options.output_dir) if word == "RUN" else word for word in arguments]
    try:
        status = main(["across", *words])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert said in " ".join(capsys.readouterr().err.split())
