"""Which tokens of incorrect answers cost the correct ones: products of single tokens' scores with their mean score.

A step that lowers an incorrect answer lowers its tokens t, and by each the mean correct answer by w <s_t, S+>. Tokens
that the answers have in common with correct ones stand out. NTHR of arXiv 2505.18830 is the last layer's part of it.
Exact here, over all probed parameters.
"""

from __future__ import annotations

import pandas as pd
import torch

from entangle.models import Policy
from entangle.rewards.groups import PromptGroup
from entangle.rewards.rollouts import Rollout
from entangle.scores import token_logps
from entangle.scores.base import studying
from entangle.scores.tokens import tokens_along


def group_tokens(policy: Policy, prompt: PromptGroup, rollout: Rollout) -> pd.DataFrame:
    """A row per scored token of every incorrect answer of a mixed prompt.

    Args:
        policy: the policy.
        prompt: correct and incorrect answers.
        rollout: their tokens.

    Returns:
        index, answer, position (in the answer, from 0), token (its text), logp, and product: <s_t, S+>, 1/parameter^2.
        An answer's products add up to the product of its whole score with S+.
    """
    batch = rollout.collate(policy.pad_id).to(policy.device)
    correct = torch.from_numpy(prompt.sides.correct).to(policy.device)
    with studying(policy.model, policy.parameters):
        logps = token_logps(policy.model, batch)
        mean = logps[correct].sum() / correct.sum()
        grads = torch.autograd.grad(
            mean, list(policy.parameters.values()), allow_unused=True, materialize_grads=True
        )
    direction = dict(zip(policy.parameters, grads, strict=True))
    products = tokens_along(policy.model, policy.parameters, batch, direction)
    tables = []
    for answer in prompt.sides.incorrect.nonzero()[0].tolist():
        targets = batch.input_ids[answer, 1:][batch.scored[answer]].tolist()
        tables.append(
            pd.DataFrame(
                {
                    "index": prompt.index,
                    "answer": answer,
                    "position": range(len(targets)),
                    "token": [str(policy.tokenizer.decode([token])) for token in targets],
                    "logp": logps[answer][batch.scored[answer]].detach().double().cpu().numpy(),
                    "product": products[answer].numpy(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
