"""The catalogue's rows and texts say what the classes say."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from entangle.catalogue import (
    FAMILIES,
    explain,
    ideal_condition,
    loss_row,
    loss_rows,
    markdown_table,
)
from losses import CATALOGUE, DPO, LDDPO, SimPO, WeightedSum, WithSFT, build


def test_the_catalogue_is_complete() -> None:
    rows = loss_rows()
    assert sorted(row.name for row in rows) == sorted(CATALOGUE)
    assert len(rows) >= 50
    assert [row.family for row in rows] == sorted((row.family for row in rows), key=FAMILIES.index)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_loss_documents_itself(name: str) -> None:
    """A title and a formula in the first line, incentives, every hyper-parameter, and the paper."""
    row, cls, text = loss_row(name), CATALOGUE[name], explain(name)
    assert row.title and row.formula and row.ratio and row.paper
    assert row.family in FAMILIES
    documentation = cls.__doc__ or ""
    assert any(word in documentation for word in ("d_w", "ncentive")), "incentives aren't stated"
    for field in dataclasses.fields(cls):
        assert f"        {field.name}: " in documentation, f"{field.name} isn't described"
    assert "Paper: " in documentation
    if row.paper[:4].isdigit():
        assert row.paper in documentation
    for stated in (row.formula, row.ratio, ideal_condition(name), cls.trap or "", cls.trl or ""):
        assert stated in text
    assert ("unconfirmed" in text) or row.is_confirmed


def test_unconfirmed_forms_say_so_in_their_own_words() -> None:
    unconfirmed = [name for name, cls in CATALOGUE.items() if not cls.is_confirmed]
    assert {"bpo", "mappo", "chipo", "minor_dpo", "gpo_exp", "unlikelihood"} <= set(unconfirmed)
    assert all("unconfirmed" in (CATALOGUE[name].__doc__ or "") or name == "tidpo" for name in unconfirmed)


def test_filters() -> None:
    assert {row.family for row in loss_rows(family="tokens")} == {"tokens"}
    coupled = {row.name for row in loss_rows(batch_coupled=True)}
    assert coupled >= {"kto", "bco", "aot", "aot_unpaired", "beta_dpo", "alpha_dpo", "sft_batch"}
    assert not coupled & {"dpo", "simpo", "sft", "with_sft"}
    free = {row.name for row in loss_rows(needs_reference=False)}
    assert {"simpo", "cpo", "sft"} <= free and "dpo" not in free
    assert {row.name for row in loss_rows(needs_tokens=True)} == {"ld_dpo", "tdpo1", "tdpo2", "tidpo", "wpo"}
    assert loss_rows(family="margin", batch_coupled=True) == []


def test_an_unknown_family_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'pairs'. Families: margin, normalised"):
        loss_rows(family="pairs")


def test_families_are_the_modules_that_hold_losses() -> None:
    assert {loss_row(name).family for name in CATALOGUE} == set(FAMILIES)
    assert all(importlib.import_module(f"losses.{family}").__doc__ for family in FAMILIES)


def test_a_wrapper_reads_what_its_parts_read() -> None:
    assert loss_row(WithSFT(DPO())).reads == "reference, lengths"
    assert loss_row(WithSFT(SimPO())).reads == "lengths"
    assert loss_row(WeightedSum((LDDPO(),), (1.0,))).reads == "reference, tokens"
    assert loss_row("sft_sum").reads == "nothing else"


def test_ideal_condition() -> None:
    assert ideal_condition("dpo") == "c < min(A, B)"
    assert ideal_condition("simpo").startswith("c/A < rho < B/c")
    assert ideal_condition("ld_dpo").startswith("not decided")
    assert "lambda" in ideal_condition("cpo")


def test_explain_shows_the_settings_it_was_given() -> None:
    text = explain({"name": "simpo", "beta": 7.5})
    assert "beta=7.5, gamma=0.5" in text
    assert "simpo_gamma is gamma here" in text
    assert explain(build("dpo")) == explain("dpo")


def test_markdown_table_has_one_well_formed_row_per_loss() -> None:
    """Every cell separator is one that was meant: a `|` inside a formula is escaped."""
    lines = markdown_table().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(CATALOGUE)
    assert {line.replace("\\|", "").count("|") for line in table} == {8}
    assert "[2305.18290](https://arxiv.org/abs/2305.18290)" in markdown_table()
    starred = sum(line.endswith("\\* |") for line in table)
    assert starred == sum(not cls.is_confirmed for cls in CATALOGUE.values())
