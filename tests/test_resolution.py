"""How far a probe's numbers are off: measured for the model at hand, and nothing in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

import entangle.measure.resolution as resolution
from entangle.analysis.geometry import GEOMETRY_COLUMNS
from entangle.analysis.predictions import geometry_of
from entangle.commands.probe import ProbeResult
from entangle.measure.reload import load_again, options_of
from entangle.measure.resolution import Resolution, relative_errors
from entangle.scores.float64 import KeepFloat64
from tests.float64_llama import row_logp
from tests.probing import options, probe, write_rows
from tests.tiny import save_adapter, save_policy


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("resolution")
    base = save_policy(folder / "base")
    adapter = save_adapter(folder / "adapter", base)
    return {"base": base, "adapter": adapter, "data": write_rows(folder / "rows.jsonl", 10)}


@pytest.fixture(scope="module")
def single(inputs, tmp_path_factory) -> ProbeResult:
    return probe(options(inputs, tmp_path_factory.mktemp("single") / "run"))


@pytest.fixture(scope="module")
def oracle(inputs, single) -> pd.DataFrame:
    """Blocks and log-probs of the probe's pairs from formulas written out in float64."""
    base, adapter = Path(inputs["base"]), Path(inputs["adapter"])
    weights = {name: value.double() for name, value in load_file(base / "model.safetensors").items()}
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] == 4  # over r = 2
    factors = {
        name.removeprefix("base_model.model."): value.double().requires_grad_()
        for name, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    config = LlamaConfig.from_pretrained(base)
    _, pairs = load_again(single.folder, options_of(single.folder), single.pairs["index"].tolist())
    rows = []
    for pair in pairs:
        found, scores = {"index": pair.index}, {}
        for side in ("chosen", "rejected"):
            ids = pair.prompt_ids + getattr(pair, f"{side}_ids")
            logp = row_logp(weights, factors, config, ids, len(pair.prompt_ids))
            grads = torch.autograd.grad(logp, list(factors.values()))
            scores[side] = torch.cat([grad.ravel() for grad in grads])
            found |= {f"logps_{side}": logp.item()}
        g_w, g_l = scores["chosen"], scores["rejected"]
        found |= {"sq_chosen": g_w @ g_w, "sq_rejected": g_l @ g_l, "inner": g_w @ g_l}
        found |= {"gap_chosen": g_w @ (g_w - g_l), "gap_rejected": g_l @ (g_l - g_w)}
        rows.append({name: float(value) for name, value in found.items()})
    return pd.DataFrame(rows)


def errors(found: ProbeResult, oracle: pd.DataFrame) -> torch.Tensor:
    assert found.pairs["index"].tolist() == oracle["index"].tolist()
    return relative_errors(geometry_of(found.pairs, 0.0), geometry_of(oracle, 0.0))


def test_float64_is_float64_all_the_way(inputs, oracle, tmp_path):
    """Norms and rotary factors too: log-probs, products and their differences agree to 1e-12 with the formulas."""
    found = probe(options(inputs, tmp_path / "run", dtype="float64"))
    assert float(errors(found, oracle).max()) < 1e-12
    for side in ("chosen", "rejected"):
        expected = oracle[f"logps_{side}"].tolist()
        assert found.pairs[f"logps_{side}"].tolist() == pytest.approx(expected, rel=1e-13)
    assert found.summary["resolution"]["worst"] < 1e-12
    assert found.provenance["resolution"] == 1e-10


def test_eager_attention_is_so_too(inputs, oracle, tmp_path):
    """Its softmax asks for float32 by name."""
    found = probe(options(inputs, tmp_path / "run", dtype="float64", attn_implementation="eager"))
    assert float(errors(found, oracle).max()) < 1e-12


def test_believed_resolution_covers_the_true_errors(single, oracle):
    """All pairs' errors against the oracle lie within what was believed from four of them; the sample's are these."""
    measured, true = single.summary["resolution"], errors(single, oracle)
    assert (measured["pairs"], measured["against"]) == (4, "float64")
    assert measured["worst"] in [pytest.approx(float(error), rel=1e-3) for error in true]
    assert float(true.max()) <= measured["believed"] == single.provenance["resolution"]
    assert measured["median"] <= measured["worst"]
    assert any("computing 4 pairs again in float64" in note for note in single.provenance["notes"])


def test_model_comes_back_bit_for_bit(inputs, single):
    policy, _ = load_again(single.folder, options_of(single.folder), [0])
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    _, pairs = load_again(single.folder, options_of(single.folder), single.pairs["index"].tolist())
    engine = resolution.make_engine(policy.model, policy.parameters, "auto")
    resolution.measure_resolution(policy, engine, single.pairs, {pair.index: pair for pair in pairs})
    for name, p in policy.model.named_parameters():
        assert p.dtype == torch.float32 and torch.equal(p, before[name])


def test_verdicts_within_it_are_withheld(inputs, single, tmp_path, monkeypatch):
    """A model whose products are off by a hundredth: changes below that have no sign, the others keep theirs."""
    monkeypatch.setattr(resolution, "MARGIN", 1e-2 / single.summary["resolution"]["worst"])
    found = probe(options(inputs, tmp_path / "run"))
    assert found.provenance["resolution"] == pytest.approx(1e-2)
    rows = found.predictions.merge(found.pairs, on="index")
    norms = (rows["sq_chosen"] * rows["sq_rejected"]) ** 0.5
    d_w, d_l = rows["incentive_chosen"].abs(), rows["incentive_rejected"].abs()
    within = (rows["change_chosen"].abs() <= 1e-2 * (d_w * rows["sq_chosen"] + d_l * norms)) | (
        rows["change_rejected"].abs() <= 1e-2 * (d_w * norms + d_l * rows["sq_rejected"])
    )
    assert (rows.loc[within, "regime"] == "degenerate").all()
    assert (rows["regime"] != "degenerate").any()


def test_without_memory_for_float64_the_other_order_is_taken(inputs, tmp_path, monkeypatch):
    def without_memory(model):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(resolution, "in_float64", without_memory)
    measured = probe(options(inputs, tmp_path / "run")).summary["resolution"]
    assert measured["against"] == "other order" and measured["believed"] >= 1e-6


def test_sixteen_bits_keep_their_own(inputs, tmp_path):
    found = probe(options(inputs, tmp_path / "run", score_dtype="bfloat16"))
    assert found.summary["resolution"] == Resolution(1.2e-2, 1.2e-2).content


def test_errors_are_relative_to_what_a_sign_is_judged_by():
    true = pd.DataFrame([dict(zip(GEOMETRY_COLUMNS, (4.0, 1.0, 1.0, 3.0, 0.0), strict=True))])
    found = true.assign(gap_rejected=0.3)
    assert relative_errors(geometry_of(found, 0.0), geometry_of(true, 0.0)).item() == pytest.approx(0.1)


def test_whoever_asks_for_float32_gets_float64():
    """The ways in which modules of transformers ask: of weights, positions and constants; other wishes are granted."""
    double, single, whole = torch.ones(2, dtype=torch.float64), torch.ones(2), torch.arange(2)
    with KeepFloat64():
        asked = [
            *(x.float() for x in (double, single, whole)),
            double.to(torch.float32),
            single.to(device="cpu", dtype=torch.float),
            double.softmax(-1, dtype=torch.float32),
            torch.nn.functional.softmax(double, dim=-1, dtype=torch.float32),
        ]
        assert {x.dtype for x in asked} == {torch.float64}
        assert double.to(torch.bfloat16).dtype == torch.bfloat16 and whole.to("cpu").dtype == torch.int64
    assert double.float().dtype == torch.float32
