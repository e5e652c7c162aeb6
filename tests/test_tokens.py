"""`entangle tokens` from a finished probe to its table and pictures, on tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from entangle.analysis.wording import visible
from entangle.cli import main
from entangle.commands.probe import ProbeResult, run_probe
from entangle.commands.tokens import TokenResult, run_tokens, token_text
from entangle.config import ProbeConfig, TokensConfig
from entangle.runs.folder import RunFolder
from tests.run_folders import synthetic_run
from tests.tiny import gpt2_tokenizer, llama_tokenizer, save_adapter, save_policy

NASTY = " the [bold red]cat[/] $x_1$ \x1b[31m\u202e\n sat"
PAIRS = [
    {"prompt": "TL;DR:", "chosen": " the cat sat on the mat", "rejected": " the other cat sat on the mat"},
    {"prompt": "TL;DR: they said", "chosen": " the sum is four", "rejected": " the sum is five"},
    {"prompt": "what is the", "chosen": NASTY, "rejected": " dogs sat"},
    {"prompt": "the cat sat " * 40, "chosen": " the cat", "rejected": " they"},
    {"prompt": "she said", "chosen": " they think", "rejected": " they think the other thing"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished probe in `run` and its inputs beside it."""
    folder = tmp_path_factory.mktemp("tokens")
    base = save_policy(folder / "base", gpt2_tokenizer())
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    config = ProbeConfig(
        model_name_or_path=base,
        adapter_name_or_path=save_adapter(folder / "adapter", base),
        max_length=64,
        dataset_name=str(folder / "rows.jsonl"),
        losses=("dpo", "simpo"),
        output_dir=str(folder / "run"),
    )
    run_probe(config, Console(quiet=True))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> str:
    """A copy of the finished probe that a test may change."""
    return str(shutil.copytree(made / "run", tmp_path / "run"))


def take_apart(run: str, **options) -> TokenResult:
    return run_tokens(TokensConfig(run=run, **options), Console(quiet=True))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must end with status 2."""
    try:
        status = main(["tokens", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    message = capsys.readouterr().err
    assert status == 2 and "Traceback" not in message, message
    return " ".join(message.split())


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_tokens_sum_to_the_probes_numbers(run, dtype):
    """A side's products sum to A, c and B, its log-probs and changes to the pair's, under every loss."""
    result = take_apart(run, pairs=(0, 1, 2, 4), dtype=dtype)
    probe = ProbeResult.load(run)
    sums = result.tokens.groupby(["index", "side"]).sum(numeric_only=True)
    for row in probe.pairs[probe.pairs["index"] != 3].to_dict("records"):
        chosen, rejected = sums.loc[(row["index"], "chosen")], sums.loc[(row["index"], "rejected")]
        scale = np.sqrt(row["sq_chosen"] * row["sq_rejected"])
        assert chosen["along_chosen"] == pytest.approx(row["sq_chosen"], rel=1e-5)
        assert rejected["along_rejected"] == pytest.approx(row["sq_rejected"], rel=1e-5)
        assert [chosen["along_rejected"], rejected["along_chosen"]] == pytest.approx(
            [row["inner"]] * 2, abs=1e-5 * scale
        )
        assert [chosen["share"], rejected["share"]] == pytest.approx(
            [1, 1], abs=1e-4 * scale / abs(row["inner"])
        )
        assert [chosen["logp"], rejected["logp"]] == pytest.approx(
            [row["logps_chosen"], row["logps_rejected"]], rel=1e-5
        )
    for row in probe.predictions.to_dict("records"):
        for side in ("chosen", "rejected"):
            found = sums.loc[(row["index"], side), f"change_{row['loss']}"]
            size = abs(row["change_chosen"]) + abs(row["change_rejected"])
            assert found == pytest.approx(row[f"change_{side}"], abs=1e-4 * size)


def test_table_names_tokens_and_what_the_responses_share(run):
    tokens = take_apart(run, pairs=(1,)).tokens
    chosen, rejected = (tokens[tokens["side"] == side] for side in ("chosen", "rejected"))
    assert "".join(chosen["text"]) == " the sum is four<|end|>"
    assert chosen["position"].tolist() == list(range(len(chosen)))
    shared = (chosen["shared"] == "prefix").sum()
    assert (
        "".join(chosen["text"][:shared]).startswith(" the sum is") and chosen["shared"].iloc[-1] == "suffix"
    )
    alike = ["logp", "along_chosen", "along_rejected", "change_dpo", "change_simpo"]
    np.testing.assert_allclose(chosen[alike][:shared], rejected[alike][:shared], rtol=1e-4, atol=1e-6)


def test_worst_pairs_are_those_whose_chosen_falls_most(run):
    predictions = ProbeResult.load(run).predictions
    predictions["change_chosen"] *= -1  # so that there are some
    RunFolder(run).write_table("predictions.parquet", predictions)
    result = take_apart(run, worst=2, losses=("simpo",))
    mine = predictions[(predictions["loss"] == "simpo") & (predictions["change_chosen"] < 0)]
    assert list(dict.fromkeys(result.tokens["index"])) == mine.nsmallest(2, "change_chosen")["index"].tolist()
    assert result.loss == "simpo"


def test_command_writes_table_and_heat_map_and_prints_both_sides(run, capsys):
    assert main(["tokens", run, "--pairs", "2", "1", "--matrix", "--rows", "3"]) == 0
    out = capsys.readouterr().out
    table = pd.read_parquet(Path(run) / "tokens.parquet")
    assert list(dict.fromkeys(table["index"])) == [2, 1]
    count = ((table["index"] == 1) & (table["side"] == "rejected")).sum()
    assert out.index("Pair 2") < out.index("Pair 1") < out.index(f"all {count} tokens")
    assert {file.name for file in (Path(run) / "tokens").iterdir()} == {"1.png", "2.png"}
    assert (Path(run) / "tokens/1.png").read_bytes().startswith(b"\x89PNG")


def test_matrix_holds_the_cosines_of_all_pairs_of_tokens(run):
    result = take_apart(run, pairs=(1,), matrix=True)
    cosines, tokens = result.matrices[1], result.tokens
    lengths = tokens.groupby("side").size()
    assert cosines.shape == (lengths["chosen"], lengths["rejected"]) and np.abs(cosines).max() < 1 + 1e-5
    shared = int((tokens["shared"] == "prefix").sum() / 2)
    np.testing.assert_allclose(cosines.diagonal()[:shared], 1, atol=1e-5)


def test_text_of_the_data_cannot_act(run, capsys):
    """Markup, escape codes, line breaks and right-to-left marks are shown, not obeyed."""
    assert main(["tokens", run, "--pairs", "2", "--matrix", "--rows", "40"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out and "\u202e" not in out and "\\x1b" in out and "\\n" in out
    assert "".join(take_apart(run, pairs=(2,)).tokens["text"]).startswith(" the [bold red]cat[/] $x_1$")
    assert visible("[red]$\x00\u202e", 40) == "[red]$\\x00\\u202e" and len(visible("x" * 99)) == 24


def test_heat_map_escapes_what_would_open_a_formula(run):
    from entangle.figures.style import new_axes
    from entangle.figures.tokens import heat_map

    result = take_apart(run, pairs=(1,), matrix=True)
    axes = heat_map(new_axes(), result.matrices[1], result.tokens.assign(text="$x_1^{$"), "$title$")
    assert {label.get_text() for label in axes.get_yticklabels()} == {r"\$x_1^{\$"}
    figure = axes.get_figure()
    figure.canvas.draw()
    assert axes.images[0].get_clim() == (-1, 1)
    assert [patch.get_label() for patch in axes.patches] == [
        f"shared prefix ({_count(result, 'prefix')})",
        "shared suffix (1)",
    ]


def _count(result: TokenResult, kind: str) -> int:
    return int((result.tokens["shared"] == kind).sum() / 2)


def test_token_text_keeps_spaces_and_names_parts_of_characters():
    plain, marked = gpt2_tokenizer(), llama_tokenizer()
    words = plain(text=" the cat")["input_ids"]
    assert "".join(token_text(plain, token) for token in words) == " the cat"
    assert "�" not in token_text(plain, plain(text="é")["input_ids"][0])
    ids = marked(text="the cat", add_special_tokens=False)["input_ids"]
    assert "".join(token_text(marked, token) for token in ids) == " the cat"


def test_bad_arguments_are_refused_with_their_reason(run, tmp_path, capsys):
    assert "entangle tokens RUN" in refused(capsys)
    assert "found none" in refused(capsys, str(tmp_path / "nowhere"))
    assert "Pair 99 isn't in" in refused(capsys, run, "--pairs", "1", "99")
    assert "Pair 3 has no scores" in refused(capsys, run, "--pairs", "3")
    assert "ipo isn't among the losses" in refused(capsys, run, "--losses", "ipo")
    assert "Unknown loss" in refused(capsys, run, "--losses", "dop")
    assert "worst must be at least 1" in refused(capsys, run, "--worst", "0")
    assert not (Path(run) / "tokens.parquet").exists()


def test_unfinished_run_is_refused(run, capsys):
    (Path(run) / "summary.json").unlink()
    assert "isn't finished" in refused(capsys, run)


def test_run_without_a_model_is_refused(tmp_path, capsys):
    """A run folder whose numbers come from elsewhere: nothing to load, or not what was measured."""
    folder = synthetic_run(tmp_path / "run").path
    assert "made from other inputs (data:" in refused(capsys, str(folder), "--pairs", "0")
    RunFolder(folder).write_yaml("config.yaml", {"rewards": "x"})
    assert "Expected the options of a probe" in refused(capsys, str(folder), "--pairs", "0")


def test_changed_model_or_data_is_refused(made, run, tmp_path, capsys):
    config = yaml.safe_load((Path(run) / "config.yaml").read_text())
    other = save_adapter(tmp_path / "other", str(made / "base"), seed=9)
    RunFolder(run).write_yaml("config.yaml", config | {"adapter_name_or_path": other})
    message = refused(capsys, run, "--pairs", "1")
    assert "other inputs (adapter:" in message and "probe again" in message
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, PAIRS[:3])))
    RunFolder(run).write_yaml("config.yaml", config | {"dataset_name": str(tmp_path / "rows.jsonl")})
    assert "other inputs (data:" in refused(capsys, run, "--pairs", "1")


def test_no_falling_pair_asks_for_names(run, capsys):
    predictions = pd.read_parquet(Path(run) / "predictions.parquet")
    predictions["change_chosen"] = predictions["change_chosen"].abs()
    RunFolder(run).write_table("predictions.parquet", predictions)
    assert "Name the pairs" in refused(capsys, run)


def test_prompt_is_not_shared_where_that_changes_log_probs(run, monkeypatch):
    """A model whose cache isn't what it seems: noticed by the probe's own log-probs."""
    import entangle.commands.tokens as module

    right = module.token_products
    calls: list[bool] = []

    def wrong(model, parameters, batch, *, share_prompt=True, **options):
        calls.append(share_prompt)
        found = right(model, parameters, batch, share_prompt=share_prompt, **options)
        if share_prompt:
            found.chosen.logps.mul_(1.1)
        return found

    monkeypatch.setattr(module, "token_products", wrong)
    assert not take_apart(run, pairs=(1,)).notes and calls == [True, False]
