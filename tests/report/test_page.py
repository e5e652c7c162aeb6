"""The HTML page: what stands in it, that text from data stays text, that it keeps its size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch

from entangle.analysis.curves import over_seeds
from entangle.analysis.findings import comparison_headline, cut_sentence
from entangle.analysis.geometry import SIDES, PairGeometry
from entangle.analysis.ledger import PARTS
from entangle.analysis.statistics import share
from entangle.analysis.wording import SENTENCES, pair_sentence
from entangle.cli import main
from entangle.commands.probe import ProbeResult
from entangle.commands.rft.change import summarise_changes
from entangle.errors import RunError, UserError
from entangle.report import page
from entangle.report.blocks import Figure, Table
from entangle.report.command import load_sources
from entangle.report.files import figures as figures_of
from entangle.report.glossary import GLOSSARY, definition_key, glossary
from entangle.report.page import render_page
from entangle.report.rows import pair_rows
from entangle.report.sections import sections
from entangle.report.source import Source, module_shares, read_source
from entangle.report.verdict import decision, verdict
from entangle.runs.folder import RunFolder
from tests.run_folders import pairs_of, synthetic_pairs, synthetic_run, with_flag

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!--<b>\u2028&amp;{{ 7*7 }}$x$"


class Reader(HTMLParser):
    """Elements, ids and links of a page, and its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "div":
            self.texts[dict(attrs).get("id") or ""] = ""
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data
        elif self.texts:
            self.texts[list(self.texts)[-1]] += data

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", {}))

    def text_of(self, identity: str) -> str:
        """All text from the `div` of an id on, up to the next one."""
        return self.texts.get(identity, "")

    def values(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]


def content_of(text: str) -> dict:
    return json.loads(Reader(text).scripts[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pairs = with_flag(synthetic_pairs(40, norm_ratio=0.8), [3], "dropped").assign(extra=range(40))
    return synthetic_run(
        tmp_path_factory.mktemp("page") / "first", pairs, losses=("dpo", "simpo", "sft")
    ).path


@pytest.fixture(scope="module")
def source(run: Path) -> Source:
    return load_sources([run])[0]


@pytest.fixture(scope="module")
def text(source: Source) -> str:
    return render_page([source])


def test_page_is_whole_and_names_nothing_outside(text):
    """Every link leads into the page, nothing is fetched, and the policy allows the page's scripts and no others."""
    reader = Reader(text)
    ids = set(reader.values("id"))
    links = {link for link in reader.values("href") if link != "data:,"}
    cards = {link for link in links if re.fullmatch(r"#pair-\d+", link)}  # the script makes these
    assert {link[1:] for link in links - cards} <= ids and not reader.values("src")
    policy = next(value for value in reader.values("content") if "default-src" in value)
    assert "default-src 'none'" in policy and "unsafe-inline'; img" in policy and "http" not in policy
    for script in reader.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0] and "eval" not in policy


def test_every_term_used_is_defined(text, source):
    """Keys of the sections, the figures and the script; the test above holds for those of the template."""
    script = (Path(page.__file__).parent / "static" / "report.js").read_text()
    keys = {key for section in sections([source]) for key in section.terms}
    blocks = [
        block for section in sections([source]) for column in section.columns.values() for block in column
    ]
    keys |= {key for block in blocks if isinstance(block, Figure) for key in block.terms}
    facts = script[script.index("const FACTS") : script.index("];", script.index("const REST"))]
    keys |= set(re.findall(r'"(\w+)"\]', facts)) | set(
        re.findall(r'fact\((?:list|rest), .*"(\w+)"\);', script)
    )
    assert len(keys) > 15 and keys <= set(GLOSSARY)


def test_definitions_of_diagnostics_are_those_of_their_registry():
    entries = glossary(["ches", "cosine", "of_the_data"])
    assert (
        definition_key("ches") == "column-ches"
        and entries["column-ches"].formula
        and entries["column-ches"].text
    )
    assert definition_key("cosine") == "cosine" and definition_key("of_the_data") == ""
    assert set(entries) == {*GLOSSARY, "column-ches"}


def test_ids_are_unique_and_a_page_of_72_pairs_is_small(tmp_path):
    run = synthetic_run(tmp_path / "run", synthetic_pairs(72, norm_ratio=0.7), losses=("dpo", "simpo", "sft"))
    text = render_page(load_sources([run.path]))
    ids = Reader(text).values("id")
    assert len(ids) == len(set(ids)) and len(text.encode()) < 500_000


def test_page_says_precision_parameters_and_metric(text):
    assert "scores in float32, 3 full parameters, SGD metric" in text


def test_data_is_text_wherever_it_goes(run, tmp_path):
    """Texts, a kind, a column, a model name and a module full of markup: no element and no script comes of them."""
    pairs = synthetic_pairs(6).assign(kind=HOSTILE, **{f"n{HOSTILE}": range(6)})
    folder = synthetic_run(
        tmp_path / "r", pairs, provenance={"model_name_or_path": f"m{HOSTILE}", "notes": [HOSTILE]}
    )
    texts = pd.DataFrame({"index": range(6), "prompt": HOSTILE, "chosen": HOSTILE, "rejected": HOSTILE})
    folder.write_table("texts.parquet", texts)
    modules = pd.DataFrame({"index": range(6), "layer": 1, "kind": HOSTILE, "inner": pairs["inner"]})
    folder.write_table("modules.parquet", modules)
    made = replace(load_sources([folder.path])[0], name=f"run{HOSTILE}")
    text = render_page([made])
    reader = Reader(text)
    assert len(reader.scripts) == 2 and not [tag for tag, _ in reader.elements if tag in ("img", "b")]
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in text and not set("<>\u2028") & set(reader.scripts[0])
    content = content_of(text)
    assert content["runs"][0]["pairs"]["texts"]["chosen"] == [HOSTILE] * 6 and content["runs"][0][
        "name"
    ].endswith(HOSTILE)
    heat = reader.text_of("figure-modules-0-0")  # the name of a module as a label, letter by letter
    assert HOSTILE[:20] in heat


def test_columns_hold_the_rows(source):
    table = pair_rows(source, 10_000_000)
    scored = source.scored
    assert (
        table["columns"]["index"] == scored["index"].tolist()
        and table["count"] == 39
        and table["total"] == 40
    )
    assert table["columns"]["cosine"] == pytest.approx(scored["cosine"].tolist(), rel=1e-3)
    dpo, _, sft = table["losses"]
    assert dpo["rho"] == 1 and sft["rho"] == 1e308 and sft["d_l"] == 0
    judged = source.judged("dpo")
    assert dpo["change_chosen"] == pytest.approx(judged["change_chosen"].tolist(), rel=1e-3)
    worst = [table["columns"]["index"][place] for place in dpo["worst"]]
    falling = judged[judged["change_chosen"] < 0].sort_values("change_chosen")["index"].tolist()
    assert (
        worst[: len(falling)] == falling[:20] and len(worst) >= 5 and dpo["falling"] == min(20, len(falling))
    )
    assert sft["falling"] == 0 and len(sft["worst"]) <= 5
    said = [SENTENCES[ord(code) - 48] for code in dpo["sentences"]]
    for sentence, row in zip(said, judged.to_dict("records"), strict=True):
        assert pair_sentence(row, row).startswith(sentence.split("{")[0].split("{loss}")[0])


def test_a_large_run_is_sampled_and_cut_within_its_budget(tmp_path):
    pairs = synthetic_pairs(3000, norm_ratio=0.7)
    folder = synthetic_run(tmp_path / "large", pairs, losses=("dpo", "simpo"))
    texts = pd.DataFrame(
        {"index": range(3000), "prompt": "p" * 900, "chosen": "c" * 900, "rejected": "r" * 900}
    )
    folder.write_table("texts.parquet", texts)
    source = load_sources([folder.path])[0]
    table = pair_rows(source, 400_000)
    assert len(json.dumps(table)) < 480_000 and 100 < table["count"] < 3000 and table["cut"] is not None
    places = set(table["losses"][0]["worst"])
    assert places and all(len(table["texts"]["chosen"][place]) == 900 for place in places)
    whole = pair_rows(source, 20_000_000)
    assert whole["count"] == 3000 and whole["cut"] is None


def test_page_says_that_it_holds_a_sample(tmp_path, monkeypatch):
    run = synthetic_run(tmp_path / "run", synthetic_pairs(300))
    monkeypatch.setattr(page, "LARGEST", 0)
    text = render_page(load_sources([run.path]))
    count = content_of(text)["runs"][0]["pairs"]["count"]
    assert 0 < count < 30 and f"hold {count} of the 300 scored" in text and "Texts are left out" in text


def test_verdict_has_share_interval_cause_and_remedy(run, source):
    """The same sentences as `entangle whatif` and `entangle probe` print."""
    first, second, third = verdict(source)
    shares = source.summary["regimes"]["dpo"]
    worst = max((name for name in shares if name != "ideal"), key=lambda name: shares[name]["count"])
    assert "under dpo, one small step" in first and "of the 39 scored pairs" in first
    for name in (worst, "ideal"):
        low, high = (f"{100 * shares[name][end]:.0f}" for end in ("low", "high"))
        assert f"{100 * shares[name]['share']:.0f} % (95 % interval {low} to {high} %)" in first
    assert second.startswith({"both_down": "Where both fall", "both_up": "Where both rise"}[worst])
    recommended = source.what_if.summary["recommendation"]
    assert recommended.startswith(f"{first} {third}") and "= " in third
    assert first in ProbeResult.load(run).table(width=1000)


def test_verdict_of_a_good_run_asks_for_no_change(tmp_path):
    scores = torch.randn(30, 3, dtype=torch.float64)
    numbers = torch.full((2, 30), -9.0)
    geometry = PairGeometry.from_scores(scores, -scores)
    run = synthetic_run(tmp_path / "good", pairs_of(geometry, numbers, numbers, numbers.abs().long()))
    first, second = verdict(load_sources([run.path])[0])
    assert first.endswith("on 100 % (95 % interval 89 to 100 %) of the 30 scored pairs.")
    assert (
        "no change is needed for one step on a pair alone" in second
        and "other pairs or earlier steps" in second
    )
    side = {"change": 1.0, "error": 3.0}
    row = {"chosen": side, "rejected": side, "regimes_epoch": {"both_down": share(6, 30)}}
    across = {"losses": {"dpo": row}}
    _, second, third = verdict(replace(load_sources([run.path])[0], across=across))
    assert "both would fall on 20 % (95 % interval 10 to 37 %)" in second and "on a pair alone" in third


def test_what_other_pairs_do_is_shown_where_it_was_measured(source):
    part = {"own": 3.0, "partner": -1.0, "pull": 5.0, "push": -7.0, "change": 0.0, "error": 2.0}
    row = {
        "rho": None,
        "chosen": part,
        "rejected": part,
        "regimes_alone": {"both_down": share(0, 40)},
        "regimes_epoch": {"both_down": share(10, 40)},
    }
    block = {"sq_chosen": 1.0, "cosine": None, "alone": {"sq_chosen": 50.0}}
    made = replace(
        source,
        across={
            "pairs": 40,
            "epoch_pairs": 40,
            "metric": "sgd",
            "set": block,
            "losses": {"dpo": row, HOSTILE: row},
        },
    )
    (section,) = [section for section in sections([made]) if section.key == "across"]
    (figure,) = [block for block in section.columns[0] if isinstance(block, Figure)]
    chosen = figure.draw(9.0).axes[0]
    assert [bar.get_width() for bar in chosen.patches[:4]] == [18.75, -6.25, 31.25, -43.75]
    assert chosen.containers[4].lines[0].get_xdata().tolist() == [0.0]
    (table,) = [block for block in section.columns[0] if isinstance(block, Table)]
    assert table.rows[0] == ["dpo", "inf", "0 [0-9]", "25 [14-40]"]
    assert not [tag for tag, _ in Reader(render_page([made])).elements if tag == "img"]


def test_module_shares_sum_to_one():
    pairs = synthetic_pairs(5)
    parts = [
        pairs.assign(layer=layer, kind="q", inner=share * pairs["inner"])
        for layer, share in ((0, 0.25), (1, 0.75))
    ]
    outside = pairs.assign(layer=pd.NA, kind="head", inner=0.0)
    shares = module_shares(pd.concat([*parts, outside], ignore_index=True), pairs).set_index("layer")["share"]
    assert shares.to_dict() == pytest.approx({0: 0.25, 1: 0.75, -1: 0.0})


def training_rows() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Steps and ledger of two pairs over three steps: each falls by a nat per step, all of it from its partner."""
    keys = [(step, index) for step in range(3) for index in range(2)]
    steps = pd.DataFrame(keys, columns=["step", "index"]).assign(
        logps_chosen=lambda d: -10.0 - d["step"],
        logps_rejected=lambda d: -11.0 - d["step"],
        regime="both_down",
        change_chosen=-1.0,
        change_rejected=-1.0,
        cosine=0.9,
    )
    ledger = pd.concat(
        [
            steps[steps["step"] > 0].assign(
                side=side, logps=-9.0, in_batch=True, measured=-1.0, **dict.fromkeys(PARTS, 0.0)
            )
            for side in ("chosen", "rejected")
        ]
    ).assign(partner=-1.0)
    return steps, ledger


def test_training_run_shows_curves_and_ledger(tmp_path):
    steps, ledger = training_rows()
    run = synthetic_run(tmp_path / "train", is_finished=False)
    for file in (run.path / "pairs").iterdir():
        file.unlink()
    (run.path / "steps").mkdir()
    run.write_table("steps/000001.parquet", steps[steps["step"] < 2])
    run.write_table("steps/000002.parquet", steps[steps["step"] == 2])
    run.write_table("ledger.parquet", ledger)
    run.write_json("summary.json", {"steps": 3})
    source = read_source(run.path)
    (section,) = sections([source])
    figures = {
        block.caption.split(":")[0]: block for block in section.columns[0] if isinstance(block, Figure)
    }
    assert figures["What moved the chosen log-prob"].table.rows[1][1] == "-2"
    first, second, third = verdict(source)
    assert "-2 nats" in first and "100 % (95 % interval" in second and "partner" in third
    assert "Over training" in render_page([source])


def test_comparison_shows_every_loss_over_training(tmp_path):
    """Two losses, two seeds, two probes: lines, dots with the range over seeds, a table, and three sentences."""
    curves = pd.DataFrame(
        [
            {
                "variant": name,
                "loss": name,
                "seed": seed,
                "step": step,
                "pairs": 8,
                "moved_chosen": step * pull + seed,
                "moved_rejected": -step,
                "moved_margin": step,
                "both_fell": both,
                "both_down": 0.0,
                "accuracy": 0.75,
            }
            for name, pull, both in (("dpo", -2.0, 0.5), (HOSTILE, 1.0, 0.125))
            for seed in (0, 1)
            for step in (0, 10)
        ]
    )
    run = RunFolder(tmp_path / "comparison")
    run.write_table("curves.parquet", curves)
    run.write_table("variants.parquet", over_seeds(curves[curves["step"] == 10], by=("variant", "loss")))
    run.write_yaml("config.yaml", {})
    run.write_json("summary.json", {"start": {"length_greedy": 31.0}})
    source = read_source(run.path)
    (section,) = sections([source])
    logps, margin, dots, table = section.columns[0]
    assert isinstance(logps, Figure) and isinstance(margin, Figure)
    assert isinstance(dots, Figure) and isinstance(table, Table)
    first, second = logps.draw(9.2).axes
    assert first.lines[0].get_ydata().tolist() == [0.5, -19.5] and second.lines[1].get_ydata().tolist() == [
        0.0,
        -10.0,
    ]
    (chosen,) = dots.draw(9.2).axes[0].containers
    assert chosen.lines[0].get_xdata().tolist() == [-19.5, 10.5]
    ends = [segment[:, 0].tolist() for segment in chosen.lines[2][0].get_segments()]
    assert ends == [[-20.0, -19.0], [10.0, 11.0]]
    assert table.rows[1][:3] == ["dpo", "-19.50±0.50", "-10.00"]
    first, second, third = verdict(source)
    assert "fallen under 1 of 2" in first and "-20 nats (dpo)" in first and "50 % (dpo)" in second
    assert "at most 0 %: other pairs" in third
    assert not [tag for tag, _ in Reader(render_page([source])).elements if tag == "img"]
    assert {figure.name for figure in figures_of(source)} == {"final", "logps", "margin"}
    rows = [
        {"variant": name, "loss": name, "seed": 0, "side": side}
        for name in ("dpo", HOSTILE)
        for side in SIDES
    ]
    ledger = pd.DataFrame(rows).assign(
        **dict.fromkeys(PARTS, 0.0) | {"momentum": -3.0, "own": 1.0, "measured": -2.0}
    )
    run.write_table("ledger.parquet", ledger)
    source = read_source(run.path)
    (section,) = sections([source])
    causes = section.columns[0][2]
    assert isinstance(causes, Figure)
    chosen = causes.draw(9.2).axes[0]
    assert [bar.get_width() for bar in chosen.patches] == [25.0, 25.0, -75.0, -75.0]
    assert chosen.lines[0].get_xdata().tolist() == [-50.0, -50.0]
    assert "-3 from momentum (gradients of earlier steps), +1 from its own score" in verdict(source)[2]
    assert "causes" in {figure.name for figure in figures_of(source)} and "momentum" in render_page([source])


def test_change_of_rewards_is_said_and_drawn(tmp_path):
    stds = pd.Series(range(1, 9)) / 10
    changes = pd.DataFrame(
        {
            "index": range(8),
            "reward_std_before": stds,
            "change": stds / 2,
            "change_error": 0.1,
        }
    )
    run = RunFolder(tmp_path / "change")
    run.write_table("changes.parquet", changes)
    run.write_yaml("config.yaml", {})
    run.write_json("summary.json", summarise_changes(changes))
    source = read_source(run.path)
    (figure,) = sections([source])[0].columns[0]
    assert isinstance(figure, Figure) and len(figure.draw(4.6).axes[0].collections[0].get_offsets()) == 8
    first, second, third = verdict(source)
    assert "+0.23 on average over 8" in first and "smallest std" in second and "is 1.00" in third
    assert [figure.name for figure in figures_of(source)] == ["change"]


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    other = synthetic_run(tmp_path / "first", synthetic_pairs(10))
    names = [source.name for source in load_sources([run, other.path])]
    assert names == [f"{run.parent.name}/first", f"{tmp_path.name}/first"]


def test_command_writes_the_page_into_the_run_or_where_told(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file() and capsys.readouterr().out.strip() == str(run / "report.html")
    assert (
        main(["report", str(run), "--output_dir", str(tmp_path)]) == 0
        and (tmp_path / "report.html").is_file()
    )
    assert (
        main(["report", str(run), "--output", str(tmp_path / "p.html")]) == 0
        and (tmp_path / "p.html").is_file()
    )


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_command_writes_figures(run, tmp_path, suffix):
    if suffix != "png":  # one format draws everything; the others show that the suffix decides
        run = synthetic_run(tmp_path / "small", synthetic_pairs(8)).path
    assert main(["report", str(run), "--format", suffix, "--output", str(tmp_path / "out")]) == 0
    files = {file.name: file.read_bytes()[:5] for file in (tmp_path / "out").iterdir()}
    assert {f"{name}.{suffix}" for name in ("regimes", "plane", "changes", "knob-shift")} <= set(files)
    assert set(files.values()) == {{"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[suffix]}


def test_errors_say_what_to_do(tmp_path, run, capsys, monkeypatch):
    assert main(["report"]) == 2 and "entangle report RUN" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2 and "run folder" in capsys.readouterr().err
    empty = synthetic_run(tmp_path / "empty", is_finished=False)
    for file in (empty.path / "pairs").iterdir():
        file.unlink()
    empty.write_json("summary.json", {})
    with pytest.raises(RunError, match="Expected pairs, prompts, training steps or a comparison"):
        read_source(empty.path)
    (tmp_path / "file").write_text("")
    assert main(["report", str(run), "--output", str(tmp_path / "file" / "p.html")]) == 2
    assert "Choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_missing_libraries_are_named(source, monkeypatch, module):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{module}: pip install jinja2 matplotlib"):
        render_page([source])


def test_results_show_themselves_in_a_notebook(run):
    from entangle import what_if

    for result in (ProbeResult.load(run), what_if(run)):
        shown = result._repr_html_()
        assert (
            shown.startswith("<pre style=")
            and "ideal" in shown
            and "[bold]" not in Reader(shown).values("style")
        )
    assert "A [bold]good[/bold] answer." in ProbeResult.load(run)._repr_html_()


def pair(
    sq_chosen: float, sq_rejected: float, inner: float, regime: str, d_w: float = 1.0, d_l: float = 1.0
) -> dict:
    """A row of pairs with its prediction."""
    return {
        "identical": False,
        "sq_chosen": sq_chosen,
        "sq_rejected": sq_rejected,
        "inner": inner,
        "regime": regime,
        "loss": "dpo",
        "incentive_chosen": d_w,
        "incentive_rejected": d_l,
    }


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (pair(1, 9, 2, "both_down"), ("both fall", "2.00 of", "between 2 and 4.5; dpo has 1", "more weight")),
        (pair(9, 1, 2, "both_up"), ("both rise", "2.00 of", "between 0.222 and 0.5", "less weight")),
        (pair(1, 1.05, 1.02, "both_down"), ("narrow band", "more weight")),
        (pair(1, 1, 1, "both_down"), ("parallel to within", "no loss separates")),
        (pair(9, 1, 2, "both_up", d_l=-1.0), ("both rise", "d_w = 1 and d_l = -1")),
        (pair(1, 1, -0.5, "ideal"), ("chosen rises and the rejected falls",)),
        (pair(1, 1, 0.5, "inverted", -1.0, -1.0), ("wrong way",)),
        (pair(0, 0, 0, "degenerate"), ("too small",)),
        (pair(1, 1, 1, "both_down") | {"identical": True}, ("same tokens",)),
    ],
)
def test_a_pair_is_explained(row, said):
    sentence = pair_sentence(row, row)
    assert all(part in sentence for part in said), sentence


def compared(**changes: list) -> pd.DataFrame:
    """Three losses at their last point: one raises both, one loses the chosen, one the margin."""
    table = pd.DataFrame(
        {
            "variant": ["good", "falling", "shrinking"],
            "pairs": 32,
            "moved_chosen": [0.5, -2.0, 1.0],
            "moved_margin": [0.4, 0.9, -0.2],
            "accuracy": [0.6, 0.7, 0.4],
        }
    ).assign(**changes)
    for name in ("moved_chosen", "moved_margin"):
        table[f"{name}_low"] = table[name] - 0.1
    return table


def test_the_best_loss_is_weighed_by_all_that_counts():
    headline, details = comparison_headline(compared(), {}, 3)
    assert headline.startswith(
        "Best of 3 losses and settings (32 probed pairs, 3 seeds): good, chosen +0.5 nats"
    )
    assert details == ()
    for changes in (
        {"moved_margin": [-0.4, 0.9, -0.2]},  # a loss whose margin shrinks isn't best, whatever else it does
        {"accuracy": [0.5, 0.7, 0.4]},
        {"rouge_l_greedy": [0.10, 0.2, 0.2]},
        {"moved_chosen": [0.05, -2.0, 1.0]},  # rises in the mean, not on every seed
    ):
        headline, details = comparison_headline(compared(**changes), {"rouge_l_greedy": 0.12}, 1)
        assert headline.startswith("None of 3 losses and settings is good in all (32 probed pairs, 1 seed)")
        assert "The margin grew on every seed under" in details[0] and "falling" in details[0]


def test_answers_that_were_cut_are_said_at_the_top(tmp_path):
    cut = {"count": 12, "share": 0.25, "reward_gap": -0.5, "reward_gap_error": 0.1}
    assert "12 answers (25 %) were cut" in cut_sentence(cut) and "0.5 ± 0.2 lower" in cut_sentence(cut)
    assert "don't differ clearly" in cut_sentence(cut | {"reward_gap": 0.1})
    assert "of what was there" in cut_sentence(cut | {"reward_gap": None, "reward_gap_error": None})
    thresholds = {"std": 0.01, "mean": 0.0}
    prevalence = dict.fromkeys(("small", "small_low", "small_high"), share(3, 8))
    summary = {"prevalence": prevalence, "thresholds": thresholds, "prompts": {"measured": 8}, "cut": cut}
    found = decision(Source(name="r", summary=summary))
    assert found is not None and "12 answers" in found.details[0]
    assert decision(Source(name="r", summary=summary | {"cut": cut | {"count": 0}})) is None
