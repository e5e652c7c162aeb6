"""How good a policy's own summaries are: ROUGE-L against a reference summary, and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from entangle.models import Policy
from entangle.rewards.functions import AnswerSet, RougeL
from entangle.rewards.rollouts import Prompt, Sampling, sample_answers

GREEDY, SAMPLED = "greedy", "sampled"
POSTS_AT_A_TIME = 16


def summaries(
    policy: Policy,
    posts: Sequence[Prompt],
    reference: str,
    samples: int,
    max_tokens: int,
    advance: Callable[[int], None] = lambda count: None,
) -> pd.DataFrame:
    """One row per post and summary: index, decoding (greedy or sampled), rouge_l, length (tokens), finished, text.

    ROUGE-L is the F1 with stemming of the library rouge-score. `finished` says whether the summary ended by itself
    within `max_tokens`. Samples are drawn at temperature 1 with a fixed seed, so policies differ, draws don't.

    Args:
        policy: the policy.
        posts: prompts with their columns.
        reference: the column with the reference summary.
        samples: sampled summaries per post; 0: none.
        max_tokens: longest summary.
        advance: told the number of posts done.
    """
    reward_function, rows = RougeL(reference), []
    ways = [(GREEDY, Sampling(num_generations=1, top_k=1, max_completion_length=max_tokens))]
    if samples:
        ways.append((SAMPLED, Sampling(num_generations=samples, max_completion_length=max_tokens)))
    for start in range(0, len(posts), POSTS_AT_A_TIME):
        batch = posts[start : start + POSTS_AT_A_TIME]
        for decoding, sampling in ways:
            for rollout in sample_answers(policy, batch, sampling):
                scores = reward_function(
                    AnswerSet(rollout.prompt.text, rollout.completions, rollout.prompt.columns)
                )
                rows += [
                    {
                        "index": rollout.prompt.index,
                        "decoding": decoding,
                        "rouge_l": float(score),
                        "length": len(ids),
                        "finished": ended,
                        "text": text,
                    }
                    for score, ids, ended, text in zip(
                        scores, rollout.answer_ids, rollout.finished, rollout.completions, strict=True
                    )
                ]
        advance(len(batch))
    return pd.DataFrame(rows)


def means(rows: pd.DataFrame) -> dict[str, float]:
    """Means of rouge_l, length and finished per decoding, as `rouge_l_greedy` and so on."""
    by_decoding = rows.groupby("decoding")[["rouge_l", "length", "finished"]].mean()
    return {
        f"{name}_{decoding}": float(row[name])
        for decoding, row in by_decoding.iterrows()
        for name in row.index
    }
