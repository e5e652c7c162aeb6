"""Commands on a finished probe that was measured under AdamW's metric, from a real optimizer.pt."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from entangle.commands.across import run_across
from entangle.commands.forecast.run import run_forecast
from entangle.commands.probe import ProbeResult
from entangle.commands.tokens import run_tokens
from entangle.config import AcrossConfig, ForecastConfig, TokensConfig
from entangle.errors import RunError
from entangle.measure.inputs import load_policy_of
from entangle.measure.reload import load_again, metric_again, options_of
from entangle.scores import AutogradEngine
from entangle.scores.tokens import token_matrix, token_products
from tests.probing import options, probe, write_rows
from tests.tiny import save_adapter, save_policy

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a probe in `run`, in float64, and the optimiser's state that it was measured with."""
    folder = tmp_path_factory.mktemp("adamw")
    base = save_policy(folder / "base")
    inputs = {
        "base": base,
        "adapter": save_adapter(folder / "adapter", base),
        "data": write_rows(folder / "rows.jsonl", 6),
    }
    given = {"dtype": "float64", "losses": ("dpo", "simpo"), "metric": "adamw"}
    config = options(inputs, folder / "run", **given, optimizer_state=str(folder))
    train(load_policy_of(config).parameters.values(), folder / "optimizer.pt")
    probe(config)
    return folder


def train(parameters, file: Path) -> None:
    """Two updates of AdamW on gradients whose sizes differ by a thousand."""
    parameters = list(parameters)
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    for _ in range(2):
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=draw) * 10 ** torch.rand(p.shape, generator=draw)).to(p)
        optimizer.step()
    torch.save(optimizer.state_dict(), file)


@pytest.fixture
def run(made, tmp_path) -> ProbeResult:
    return ProbeResult.load(shutil.copytree(made / "run", tmp_path / "run"))


def preconditioned(run: ProbeResult) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: every pair's scores times the root of the metric, `(pairs, theta)` each."""
    asked = options_of(run.folder)
    policy, pairs = load_again(run.folder, asked, run.pairs["index"].tolist())
    metric = metric_again(asked, policy)
    assert metric is not None
    scores = AutogradEngine(policy.model, policy.parameters).scores(policy.collate(pairs))
    flat = torch.cat([scores[name] * metric[name].double().sqrt().ravel() for name in policy.parameters], 1)
    chosen, rejected = flat.chunk(2)
    return chosen.numpy(), rejected.numpy()


def test_tokens_sum_to_the_probes_numbers_under_the_metric(run):
    found = run_tokens(TokensConfig(run=str(run.folder.path), pairs=(0, 3), matrix=True), QUIET).tokens
    for index in (0, 3):
        row = run.pairs.set_index("index").loc[index]
        own = found[found["index"] == index].groupby("side", sort=False).sum(numeric_only=True)
        expected = [[row["sq_chosen"], row["inner"]], [row["inner"], row["sq_rejected"]]]
        np.testing.assert_allclose(own[["along_chosen", "along_rejected"]], expected, rtol=1e-6)
        for loss in ("dpo", "simpo"):
            judged = run.predictions[run.predictions["loss"] == loss].set_index("index").loc[index]
            changes = [judged["change_chosen"], judged["change_rejected"]]
            np.testing.assert_allclose(own[f"change_{loss}"], changes, rtol=1e-6)


def test_every_token_has_the_metric_in_its_products(run):
    """By one backward pass per token; the matrix of all products too."""
    asked = options_of(run.folder)
    policy, (pair,) = load_again(run.folder, asked, [2])
    metric, batch = metric_again(asked, policy), policy.collate([pair])
    assert metric is not None
    found = token_products(policy.model, policy.parameters, batch, full=True, metric=metric)
    plain = token_matrix(policy.model, policy.parameters, batch)
    chosen, rejected = preconditioned(run)
    place = run.pairs["index"].tolist().index(2)
    assert found.geometry.sq_chosen.item() == pytest.approx(chosen[place] @ chosen[place], rel=1e-9)
    matrix = found.matrix
    assert matrix is not None and not torch.allclose(matrix, plain, rtol=1e-2)
    n = len(found.chosen.ids)
    for side, part in ((found.chosen, slice(None, n)), (found.rejected, slice(n, None))):
        torch.testing.assert_close(matrix[part, :n].sum(1), side.along_chosen, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(matrix[part, n:].sum(1), side.along_rejected, rtol=1e-9, atol=1e-9)


def test_across_has_the_metric_in_its_products(run):
    """The set's block, from all scores written out: mean products of different pairs."""
    found = run_across(AcrossConfig(run=str(run.folder.path)), QUIET).summary
    chosen, rejected = preconditioned(run)
    n = len(chosen)

    def between(a: np.ndarray, b: np.ndarray) -> float:
        gram = a @ b.T
        return float((gram.sum() - np.trace(gram)) / (n * (n - 1)))

    block = found["set"]
    assert found["metric"] == "adamw"
    assert block["sq_chosen"] == pytest.approx(between(chosen, chosen), rel=1e-6)
    assert block["inner"] == pytest.approx(between(chosen, rejected), rel=1e-6)


def test_forecast_takes_it_too(run):
    result = run_forecast(
        ForecastConfig(run=str(run.folder.path), max_steps=2, per_device_train_batch_size=2), QUIET
    )
    assert len(result.curves)


@pytest.mark.parametrize("command", ["tokens", "across"])
def test_another_state_is_refused(run, made, command):
    kept = (made / "optimizer.pt").read_bytes()
    state = torch.load(made / "optimizer.pt")
    state["state"][0]["exp_avg_sq"] *= 2
    torch.save(state, made / "optimizer.pt")
    place = str(run.folder.path)
    try:
        with pytest.raises(RunError, match="optimizer"):
            if command == "tokens":
                run_tokens(TokensConfig(run=place, pairs=(0,)), QUIET)
            else:
                run_across(AcrossConfig(run=place), QUIET)
    finally:
        (made / "optimizer.pt").write_bytes(kept)
