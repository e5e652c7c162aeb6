"""What tables say first: of which data, against which reference, what `ideal` is; and the set's sentence once."""

from __future__ import annotations

from pathlib import Path

import pytest

from entangle.analysis.set_verdict import set_verdict
from entangle.commands.tokens import run_tokens
from entangle.commands.whatif import what_if
from entangle.config import TokensConfig
from entangle.tables.base import IDEAL_MEANS, of_data
from tests.probing import options, probe

WIDE = 400


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    return probe(options(inputs, tmp_path_factory.mktemp("headings") / "run", losses=("dpo", "cpo")))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("embedded", "3 embedded pairs"),
        ("trl-lib/ultrafeedback_binarized", "3 pairs of trl-lib/ultrafeedback_binarized"),
        ("/data/set", "3 pairs of set"),
        ("data/rows.parquet", "3 pairs of rows.parquet"),
        (None, "3 pairs"),
    ],
)
def test_data_go_by_a_short_name(name, said):
    assert of_data(3, "pairs", {} if name is None else {"dataset_name": name}) == said


def test_probe_whatif_and_tokens_name_data_and_reference(finished, inputs):
    count, name = len(finished.pairs), Path(inputs["data"]).name
    path = finished.folder.path
    found = [finished, what_if(path), run_tokens(TokensConfig(run=str(path), worst=1))]
    for text in (result.table(WIDE) for result in found):
        assert text.startswith(f"{count} pairs of {name}, {count} scored")
        assert "reference: the model without its adapter" in text and "adapter_off" not in text


def test_ideal_is_explained_where_it_first_appears(finished):
    for result in (finished, what_if(finished)):
        text = " ".join(result.table(WIDE).split())
        assert IDEAL_MEANS in text and text.index(IDEAL_MEANS) - text.index("ideal") < 40
        assert text.count(IDEAL_MEANS) == 1


def test_the_sets_sentence_is_said_once_and_last(finished):
    text, said = finished.table(4 * WIDE), set_verdict(finished.summary["set"], "dpo")
    assert finished.set.table(4 * WIDE).count(said) == 1  # shown alone, the set says it itself
    assert text.count(said) == 1 and text.rindex(said) > text.index("Distribution over the pairs")


def test_learning_rates_are_put_in_plain_words(finished):
    for text in (finished.table(WIDE), what_if(finished).table(WIDE)):
        assert "per lr" not in text and "unit learning rate" not in text and "unit of learning" not in text
        assert "step of learning rate 1" in text
