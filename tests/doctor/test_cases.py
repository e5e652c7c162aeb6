"""Inputs that people met in public, kept beside the repository: each has a right answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from entangle.cli import main

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
STATE = "trainer_state.json"

RIGHT: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    f"01-loss-stuck-at-ln2/rewards_zero/{STATE}": (
        1,
        ("nothing_trains", "one model"),
        ("without reference",),
    ),
    f"01-loss-stuck-at-ln2/logps_zero_too/{STATE}": (
        1,
        ("no token of the answers is scored",),
        ("without reference",),
    ),
    f"01-loss-stuck-at-ln2/rewards_of_rounding/{STATE}": (1, ("nothing_trains",), ("without reference",)),
    f"logs/frozen-dpo/{STATE}": (
        1,
        ("grad_norm is exactly 0 in all 20 rows", "from the first row"),
        ("rise together", "grown", "No warning"),
    ),
    f"04-fp16/all_nan_loss_zero/{STATE}": (1, ("From step 20 on", "isn't success", "bf16"), ("saturation",)),
    f"04-fp16/scaler_warms_up/{STATE}": (0, ("note not_finite", "loss scaler"), ("warning not_finite",)),
    f"04-fp16/logits_nan_only/{STATE}": (0, ("note not_finite", "logits/chosen"), ()),
    f"logs/falls-then-recovers-dpo/{STATE}": (-1, ("note not_finite", "evaluation"), ("nothing is learned",)),
    "05-other-trainers-files/ms_swift_dpo/logging.jsonl": (1, ("coupled_fall",), ()),
    "05-other-trainers-files/ms_swift_grpo/logging.jsonl": (1, ("dead_groups",), ()),
    "05-other-trainers-files/llamafactory/trainer_log.jsonl": (2, ("LLaMA-Factory", STATE), ()),
    "05-other-trainers-files/verl/exp.jsonl": (2, ("verl", "tensorboard"), ()),
    "05-other-trainers-files/openrlhf/metrics.jsonl": (1, ("coupled_fall",), ()),
    "logs/llamafactory-dpo/trainer_log.jsonl": (2, ("LLaMA-Factory", STATE), ("found none",)),
    "06-printed-rows/train.log": (1, ("coupled_fall",), ()),
    "06-printed-rows/train_transformers5.log": (1, ("coupled_fall",), ()),
    "06-printed-rows/notebook_table.md": (1, ("coupled_fall", "steps 10 to 250"), ()),
    f"08-grpo-before-trl-0.27/dead_out_of_reach/{STATE}": (
        1,
        ("From step 36 on no group has any spread", "out of reach"),
        ("taken over the whole batch",),
    ),
    f"08-grpo-before-trl-0.27/one_prompt_a_step/{STATE}": (
        1,
        ("In 60 % of the rows reward_std is exactly 0",),
        ("taken over the whole batch",),
    ),
    f"08-grpo-before-trl-0.27/all_dead_from_the_start/{STATE}": (
        1,
        ("rewards/accuracy/std of up to 5.08", "within groups here"),
        ("taken over the whole batch",),
    ),
    f"logs/grpo-one-prompt-a-step/{STATE}": (-1, (), ("taken over the whole batch",)),
    f"logs/grpo-gemma3/{STATE}": (0, ("No warning",), ("taken over the whole batch",)),
    f"09-grpo-kl-explodes/{STATE}": (
        1,
        ("From step 39 on KL is off", "before step 39", "reward_falls", "1.3"),
        (),
    ),
    f"11-grpo-nothing-moves/{STATE}": (
        1,
        ("grad_norm and kl are exactly 0 in all 40 rows although groups have",),
        (),
    ),
    f"12-grpo-loss-zero-is-normal/{STATE}": (0, ("loss near 0 is normal in GRPO",), ()),
    f"15-orpo-of-llamafactory/{STATE}": (
        0,
        ("a run without reference", "means over a response's tokens", "note coupled_rise", "next to nothing"),
        (),
    ),
    "16-run-started-twice/metrics.jsonl": (0, ("steps 10 to 120", "go back"), ()),
    "16-run-started-twice/runs": (0, ("steps 10 to 120", "go back"), ()),
    f"17-four-rows-and-all-over/{STATE}": (
        1,
        ("loss is 0.0000", "lost 1360 nats", "learning rate is far too high"),
        (),
    ),
}
"""By input: the exit status (-1: none is asked for), what must be said, and what mustn't."""


@pytest.mark.parametrize("case", RIGHT)
def test_right_answer(case, capsys):
    if not (CASES / case).exists():
        pytest.skip(f"{CASES / case} isn't here")
    expected, words, wrong = RIGHT[case]
    status = main(["doctor", str(CASES / case)])
    out, err = capsys.readouterr()
    shown = " ".join((out + err).split())
    assert expected in (-1, status), shown
    assert [word for word in words if word not in shown] == [] and [
        word for word in wrong if word in shown
    ] == [], shown
