"""`entangle why`: from a folder that plain TRL left, and those of other trainers, to five lines and a page."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM
from trl import DPOConfig  # pyright: ignore[reportPrivateImportUsage]

from entangle.analysis.trl_lines import trl_lines
from entangle.analysis.why import Answer, answers, exit_status
from entangle.cli import main
from entangle.commands.across import AcrossResult
from entangle.commands.why import WhyResult, run_why
from entangle.commands.why.size import FEWEST, MOST_STEPS, Pace, fit
from entangle.commands.why.training import read_training
from entangle.config import WhyConfig
from entangle.errors import RunError
from entangle.runs.progress import Interrupted
from entangle.tables.base import render
from entangle.tables.why import WIDTH, why_text
from losses import CATALOGUE, DPO, DPOP, SFT, SFTBatch, WithSFT
from tests.falling import falling_pairs, saved_base, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pairs(base: Path) -> str:
    falling_pairs().to_json(base / "pairs.jsonl")
    return str(base / "pairs.jsonl")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of plain TRL with an evaluation set, three checkpoints, and nothing of ours."""
    evaluation = falling_pairs(8, seed=9).remove_columns("kind")
    args = {"eval_strategy": "steps", "eval_steps": 4}
    return trained(tmp_path_factory.mktemp("lora"), base, args=args, eval_dataset=evaluation)


def copy(run: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("why", *without))
    return folder


def why(run: Path, data: str = "", **options: Any) -> WhyResult:
    return run_why(WhyConfig(run=str(run), dataset_name=data, minutes=2.0, max_length=64, **options))


def of(result: WhyResult, question: str) -> Answer:
    return next(answer for answer in result.answers if answer.question == question)


def said(result: WhyResult) -> str:
    return " ".join(result.evidence["missing"])


# --- plain TRL, from nothing to the page -----------------------------------------------------------------------


def test_from_nothing_to_five_lines_and_a_page(
    lora: Path,
    pairs: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Within the minutes given, by the command line: the fall is seen, status 1, and the page says the same."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    run, minutes = copy(lora, tmp_path / "run"), 2
    began = time.monotonic()
    words = [str(run), "--dataset_name", pairs, "--minutes", str(minutes), "--max_length", "64"]
    assert main(["why", *words]) == 1
    assert time.monotonic() - began < 60 * minutes
    out, err = capsys.readouterr()
    first = out.splitlines()[:5]
    assert [line.split()[0] for line in first] == ["falling", "since", "harmful", "which", "stop"]
    assert first[0].startswith("falling yes: chosen -")
    assert [
        line
        for line in out.splitlines()
        if len(line) > WIDTH and not line.startswith(("Page: ", "Run folder: "))
    ] == []
    assert "24 pairs at checkpoints 4, 8 and 12: about" in " ".join(err.split())  # before it starts
    page = (run / "why" / "report.html").read_text(encoding="utf-8")
    for line in (first[0].removeprefix("falling "), "What the five lines rest on", "Over training"):
        assert line in page
    assert main(["report", str(run / "why")]) == 0


def test_what_the_lines_say_is_what_plain_forward_passes_give(lora: Path, base: Path, pairs: str):
    from peft import PeftModel

    from tests.test_sweep import plain

    result = why(lora, pairs)
    before = plain(AutoModelForCausalLM.from_pretrained(base), pairs)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora / "checkpoint-12")
    change = plain(model, pairs) - before
    found = result.evidence["measured"]
    np.testing.assert_allclose(found["chosen"]["value"], change.mean(), atol=2e-5)
    np.testing.assert_allclose(found["lost"]["value"], change.sum() / before.sum(), atol=1e-5)
    tokens = np.array([len(text.split()) + 1 for text in falling_pairs()["chosen"]])  # and the end
    np.testing.assert_allclose(found["per_token"]["value"], (change / tokens).mean(), atol=1e-5)
    assert found["chosen"]["low"] < change.mean() < found["chosen"]["high"] < 0
    held_out = result.evidence["log"]["held_out"]
    state = json.loads((lora / "checkpoint-12" / "trainer_state.json").read_text())
    last = [row["eval_rewards/chosen"] for row in state["log_history"] if "eval_rewards/chosen" in row][-1]
    np.testing.assert_allclose(held_out["value"], last)
    assert "Held out, by the log's evaluation set: the chosen reward falls too" in " ".join(
        of(result, "harmful").details
    )


def test_the_responsible_pairs_are_those_whose_steps_lower_the_others(lora: Path, pairs: str):
    """Against plain gradients: what a step on pair j alone does to the mean chosen log-prob of the others."""
    import torch

    from entangle.config import ModelOptions
    from entangle.data import tokenize_pair
    from entangle.measure.inputs import load_pairs_of
    from entangle.models import load_policy
    from tests.test_sweep import row_logps_with_graph

    result = why(lora, pairs)
    policy = load_policy(ModelOptions(str(lora / "checkpoint-4")))
    own = list(policy.parameters.values())
    scores, incentives = [], []
    assert result.probe is not None
    told = result.probe.predictions[result.probe.predictions["loss"] == "dpo"].set_index("index")
    for pair in load_pairs_of(WhyConfig(dataset_name=pairs)):
        batch = policy.collate([tokenize_pair(policy.tokenizer, pair, 64)])
        sides = [torch.autograd.grad(row_logps_with_graph(policy.model, batch)[k], own) for k in (0, 1)]
        scores.append([torch.cat([g.flatten() for g in side]).double() for side in sides])
        incentives.append(told.loc[pair.index, ["incentive_chosen", "incentive_rejected"]].to_numpy(float))
    chosen = torch.stack([score[0] for score in scores])
    expected = []
    for j, ((g_w, g_l), (d_w, d_l)) in enumerate(zip(scores, incentives, strict=True)):
        others = [i for i in range(len(scores)) if i != j]
        expected.append(float((chosen[others] @ (d_w * g_w - d_l * g_l)).mean()))
    rows = AcrossResult.load(result.probe.folder.path).rows.sort_values("index")
    np.testing.assert_allclose(rows["exerted_chosen"], expected, rtol=1e-4, atol=1e-6)
    worst = np.argsort(expected)[:2].tolist()
    found = result.evidence["responsible"]
    assert found["pairs"] == worst
    lowering = -np.minimum(expected, 0)
    np.testing.assert_allclose(found["share"]["value"], lowering[worst].sum() / lowering.sum(), rtol=1e-4)
    assert found["share"]["low"] < found["share"]["value"] < found["share"]["high"]
    assert found["tokens"]["pair"] in worst and len(found["tokens"]["chosen"]) == 3


def test_the_lines_to_paste_are_trls_and_stop_the_fall(lora: Path, pairs: str, tmp_path: Path):
    result = why(lora, pairs)
    options = yaml.safe_load("\n".join(of(result, "stop it").paste))
    config = DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", **options)
    assert config.loss_type == ["sigmoid", "sft"] and config.loss_weights == options["loss_weights"]
    found = result.evidence["change"]
    assert found["after"]["value"] > 0 > found["before"]["value"]


def test_run_again_it_measures_nothing_twice(lora: Path, pairs: str, monkeypatch: pytest.MonkeyPatch):
    first = why(lora, pairs)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    for name in ("run_probe", "probe", "run_across"):
        monkeypatch.setattr(f"entangle.commands.why.measuring.{name}", never)
    again = why(lora, pairs)
    assert again.answers == first.answers


def test_a_run_that_was_stopped_goes_on(
    lora: Path, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import entangle.commands.why.measuring as module

    run, original, made = copy(lora, tmp_path / "run"), module.run_probe, []

    def stopping(config: Any, console: Any) -> Any:
        if len(made) == 1:
            raise Interrupted
        made.append(config.run_path.name)
        return original(config, console)

    with monkeypatch.context() as patch:
        patch.setattr(module, "run_probe", stopping)
        with pytest.raises(Interrupted, match="at checkpoint 2 of 3.*entangle why --config .*--minutes 2"):
            why(run, pairs)
    monkeypatch.setattr(module, "run_probe", lambda *a: (made.append(a[0].run_path.name), original(*a))[1])
    assert why(run, pairs).answers == why(lora, pairs).answers
    assert made == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


# --- other trainers' folders ------------------------------------------------------------------------------------


def as_llamafactory(run: Path) -> Path:
    """trainer_log.jsonl beside the checkpoints, whose trainer_state.json has the rewards; options of its own names."""
    rows = [{"current_steps": 5, "total_steps": 12, "loss": 0.6, "accuracy": 0.7, "lr": 1e-3, "epoch": 1.0}]
    (run / "trainer_log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "training_args.yaml").write_text(
        yaml.safe_dump({"stage": "dpo", "pref_loss": "sigmoid", "pref_beta": 0.2, "pref_ftx": 0.0})
    )
    return run


def as_ms_swift(run: Path) -> Path:
    """Everything one folder down, the log as logging.jsonl, the options in args.json."""
    inner = run / "v0-20261128-101010"
    inner.mkdir()
    for file in list(run.glob("checkpoint-*")):
        shutil.move(file, inner / file.name)
    state = json.loads((inner / "checkpoint-12" / "trainer_state.json").read_text())
    rows = [row | {"global_step/max_steps": f"{row['step']}/12"} for row in state["log_history"]]
    (inner / "logging.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for file in inner.glob("checkpoint-*/trainer_state.json"):
        file.unlink()
    (inner / "args.json").write_text(json.dumps({"rlhf_type": "dpo", "beta": 0.2, "loss_type": None}))
    return run


def as_axolotl(run: Path) -> Path:
    """Its own file in the model card."""
    (run / "README.md").write_text(
        "---\ntags: [axolotl, trl, dpo]\n---\n<details>\n\n```yaml\nbase_model: nowhere/to-be-found\nrl: dpo\n"
        "rl_beta: 0.2\n```\n"
    )
    return run


def as_unsloth(run: Path) -> Path:
    """TRL's own layout; the card of the final adapter only."""
    return run


FOLDERS = {
    "llamafactory": as_llamafactory,
    "ms_swift": as_ms_swift,
    "axolotl": as_axolotl,
    "unsloth": as_unsloth,
}


@pytest.mark.parametrize("trainer", FOLDERS)
def test_folders_of_other_trainers(trainer: str, lora: Path, pairs: str, tmp_path: Path):
    run = FOLDERS[trainer](copy(lora, tmp_path / "run"))
    result = why(run, pairs)
    assert result.answers[0].verdict == "yes" and result.exit_status == 1
    assert result.evidence["log"]["last_step"] == 12 and result.evidence["measured"]["steps"] == [4, 8, 12]
    assert result.sweep is not None
    beta = 0.1 if trainer == "unsloth" else 0.2
    assert result.sweep.summary["loss"] == DPO(beta=beta).label and "Loss: dpo" in said(result)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"rlhf_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
            {"name": "simpo", "beta": 2.0, "gamma": 1.0},
        ),
        ({"pref_loss": "orpo", "pref_beta": 0.3}, {"name": "orpo", "odds_weight": 0.3}),
        ({"loss_type": "ipo", "beta": 0.5}, {"name": "ipo_avg", "tau": 0.5}),
        ({"loss_type": ["sigmoid"], "beta": 0.1}, {"name": "dpo", "beta": 0.1}),
        (
            {"pref_loss": "sigmoid", "pref_beta": 0.1, "pref_ftx": 0.5},
            {
                "name": "with_sft",
                "loss": {"name": "dpo", "beta": 0.1},
                "alpha": 0.5,
                "sft": {"name": "sft_batch"},
            },
        ),
        ({"learning_rate": 1e-5}, None),
        ({"loss_type": "no_such_loss"}, None),
    ],
)
def test_the_loss_that_files_name(settings: dict[str, Any], expected: Any, tmp_path: Path):
    (tmp_path / "args.json").write_text(json.dumps(settings))
    spec, source = read_training(tmp_path).loss
    assert spec == expected and bool(source) == ("learning_rate" not in settings)


def test_nothing_is_unpickled(lora: Path, pairs: str, tmp_path: Path):
    """A training_args.bin that would act on being opened is left alone."""
    run = copy(lora, tmp_path / "run")
    for file in run.rglob("training_args.bin"):
        file.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR.")
    why(run, pairs, limit=FEWEST)
    assert not (tmp_path / "opened").exists()


# --- what is missing --------------------------------------------------------------------------------------------


def test_without_pairs_the_log_answers(lora: Path, tmp_path: Path):
    result = why(copy(lora, tmp_path / "run"))
    assert result.exit_status == 1 and "by the log" in of(result, "falling").line
    assert "the run's pairs aren't named. Name them: --dataset_name PAIRS" in said(result)
    assert of(result, "which").line == "can't tell: no pair was measured" == of(result, "stop it").line


def test_without_checkpoints_the_log_answers(lora: Path, pairs: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    shutil.copy(lora / "checkpoint-12" / "trainer_state.json", tmp_path / "run")
    result = why(tmp_path / "run", pairs)
    assert result.exit_status == 1 and "no checkpoint is in" in said(result) and "save_steps" in said(result)


def test_without_a_log_the_checkpoints_answer(lora: Path, pairs: str, tmp_path: Path):
    result = why(copy(lora, tmp_path / "run", "trainer_state.json"), pairs, limit=FEWEST)
    assert result.exit_status == 1 and "No log: Expected a log in" in said(result)
    assert "the log has no evaluation set" in " ".join(of(result, "harmful").details)


def test_with_the_final_model_alone(lora: Path, pairs: str, tmp_path: Path):
    """save_strategy no, then save_model: the adapter lies in the folder itself."""
    shutil.copytree(
        lora / "checkpoint-12", tmp_path / "run", ignore=shutil.ignore_patterns("trainer_state.json")
    )
    result = why(tmp_path / "run", pairs)
    assert result.exit_status == 1 and "between the start and the end" in of(result, "since").line
    assert "the final model against the start" in of(result, "falling").details[0]


def test_without_its_base_the_log_answers(lora: Path, pairs: str, tmp_path: Path):
    run = copy(lora, tmp_path / "run", "README.md")  # which names it, too
    for file in run.glob("checkpoint-*/adapter_config.json"):
        content = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
        file.write_text(json.dumps(content))
    result = why(run, pairs)
    assert result.exit_status == 1 and "there is no such folder here" in said(result)
    assert "--model_name_or_path BASE" in said(result)


def test_a_base_that_is_elsewhere_now_can_be_named(lora: Path, base: Path, pairs: str, tmp_path: Path):
    run = copy(lora, tmp_path / "run", "README.md")  # which names it, too
    for file in run.glob("checkpoint-*/adapter_config.json"):
        content = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
        file.write_text(json.dumps(content))
    result = why(run, pairs, model_name_or_path=str(base), limit=FEWEST)
    assert result.exit_status == 1 and result.evidence["measured"]["pairs"] == FEWEST


def test_full_training_counts_from_its_base_or_says_that_it_is_not_named(
    base: Path, pairs: str, tmp_path: Path
):
    run = trained(tmp_path / "run", base, peft_config=None, args={"learning_rate": 3e-4})
    told = why(run, pairs, model_name_or_path=str(base))
    assert told.evidence["measured"]["start"] == "reference (model)" and told.exit_status == 1
    untold = why(run, pairs)
    assert untold.evidence["measured"]["start"] == "checkpoint-4"
    assert "--model_name_or_path MODEL mends that" in said(untold)


def test_too_few_pairs_are_said(lora: Path, pairs: str, tmp_path: Path):
    result = why(copy(lora, tmp_path / "run"), pairs, limit=5)
    assert "Only 5 pairs could be measured; below 16 hardly anything can be told." in said(result)


def test_a_set_that_is_not_measurable_leaves_the_pairs(lora: Path, tmp_path: Path):
    """One prompt: no products of different prompts' scores."""
    one = falling_pairs().map(lambda row: {"prompt": "w1 w2"})
    one.to_json(tmp_path / "pairs.jsonl")
    result = why(copy(lora, tmp_path / "run"), str(tmp_path / "pairs.jsonl"))
    assert of(result, "stop it").details[0].startswith("Each pair alone")
    assert len(result.answers) == 5


def test_a_log_of_sampled_answers_is_refused_in_words(tmp_path: Path):
    rows = [{"step": step, "reward": 0.5, "reward_std": 0.1, "loss": 0.0} for step in range(1, 20)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    with pytest.raises(RunError, match=r"(?s)Nothing to answer from\..*sampled answers.*entangle rft"):
        why(tmp_path)


def test_nothing_at_all_is_status_2_with_every_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["why", str(tmp_path), "--dataset_name", "nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert main(["why", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "- No log: Expected a log in" in err and "- No pairs measured: no checkpoint is in" in err
    assert main(["why", str(tmp_path / "gone")]) == 2 and not list(tmp_path.iterdir())
    assert "Expected the output folder of a training run" in capsys.readouterr().err
    assert main(["why"]) == 2 and "entangle why OUTPUT_DIR" in capsys.readouterr().err


# --- size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_pair", [1e-4, 1e-2, 0.3, 1.0, 5.0, 60.0])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_size_fits_the_time_or_is_the_least_there_is(per_pair: float, steps: int):
    size = fit(1000, range(10, 10 * (steps + 1), 10), Pace(per_pair, loading=2.0), seconds=600)
    assert FEWEST <= size.pairs <= 512 and len(size.steps) <= MOST_STEPS
    assert size.steps[-1] == 10 * steps and (steps == 1 or size.steps[0] == 10)
    assert size.seconds <= 600 or (size.pairs == FEWEST and len(size.steps) <= 2)


def test_few_pairs_are_all_taken():
    assert fit(20, (1, 2, 3), Pace(0.01, 0.1), 60).pairs == 20
    assert fit(5, (1, 2, 3), Pace(100.0, 0.1), 60).pairs == 5


# --- sentences --------------------------------------------------------------------------------------------------


def evidence(scale: float, step: int) -> dict[str, Any]:
    """What is found where numbers are of some size."""
    move = {"value": -scale, "low": -1.3 * scale, "high": -0.7 * scale}
    share = {"count": 40, "share": 0.8, "low": 0.7, "high": 0.9}
    log = {"chosen": move, "rejected": move, "onset": step, "warnings": ["coupled_fall"], "held_out": move}
    log |= {"first_step": 1, "last_step": step, "source": "training rows"}
    measured = {"pairs": 50, "sample": "", "start": "reference (model)", "steps": [step, 2 * step]}
    measured |= {"chosen": move, "rejected": move, "per_token": move, "lost": move | {"value": scale}}
    measured |= {"both_fell": share, "grew": share, "since": {"before": step, "from": 2 * step}}
    part = {"value": 0.8, "low": 0.7, "high": 0.9}
    which = {"pairs": [100000 + k for k in range(51)], "of": 512, "share": part, "step": step}
    which |= {"alone": "", "kinds": [], "tokens": None}
    change = {
        "verdict": [],
        "is_steady": False,
        "knob": "nll_batch",
        "setting": 0.00042,
        "lines": ["loss_type: x"],
    }
    change |= {"before": None, "after": None, "instead": ""}
    return {"log": log, "measured": measured, "responsible": which, "change": change, "missing": []}


@pytest.mark.parametrize("scale", [1e-5, 0.02, 0.73, 1.0, 9.96, 123.4, 999.0])
def test_five_lines_fit_eighty_columns(scale: float):
    found = answers(evidence(scale, step=123456))
    shown = render(why_text([answer.content for answer in found]), WIDTH).splitlines()
    heads = [line[:7].strip() for line in shown[:6]]
    assert heads == ["falling", "since", "harmful", "which", "stop it", ""], shown[:6]
    assert all(len(line.rstrip()) <= WIDTH for line in shown)


def test_the_first_answer_is_the_exit_status():
    found = evidence(1.0, 10)
    assert exit_status(answers(found)) == 1
    rise = {"value": 1.0, "low": 0.5, "high": 1.5}
    unsure = {"value": -1.0, "low": -2.5, "high": 0.5}
    for chosen, by_log, status in ((rise, rise, 0), (unsure, unsure, 2), (rise, None, 1), (unsure, None, 1)):
        given = found | {"measured": found["measured"] | {"chosen": chosen}}
        if by_log is not None:
            given |= {"log": found["log"] | {"chosen": by_log}}
        assert exit_status(answers(given)) == status


def test_control_characters_of_the_data_are_escaped():
    found = evidence(1.0, 10)
    found["responsible"] |= {"column": "kind", "kinds": [("\x1b[31m", found["log"]["chosen"], 3)]}
    assert "\x1b" not in render(why_text([answer.content for answer in answers(found)]), WIDTH)


@pytest.mark.parametrize("name", CATALOGUE)
def test_trls_lines_make_trls_config(name: str, tmp_path: Path):
    """Whatever is offered can be pasted: DPOConfig takes it, and it is read back as the same loss."""
    from entangle.config.foreign import losses_of_trl
    from losses import build

    loss = build(name)
    lines = trl_lines(loss)
    if lines is None:
        return
    options = yaml.safe_load("\n".join(lines))
    DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", **options)
    assert build(losses_of_trl(options)[0]) == loss


def test_what_trl_lacks_has_no_lines():
    assert trl_lines(DPOP()) is None and trl_lines(WithSFT(DPO(), sft=SFT())) is None
    assert trl_lines(WithSFT(DPO(), alpha=0.5, sft=SFTBatch())) is not None
