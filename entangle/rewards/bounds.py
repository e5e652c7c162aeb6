"""Upper bounds on ||grad V||, the norm of the expected reward's gradient, by the spread of the rewards.

All vanish with STD (notation: `entangle.rewards.statistics`; theorem: arXiv 2310.20703). [derived] marks what is
derived in this project and tested on enumerated policies.
"""

from __future__ import annotations

import math


def paper_bound(std: float, length: float, gamma: float, half_range: float = 1.0) -> float:
    """6 L gamma R^(1/3) STD^(2/3) >= ||grad V||: the bound of arXiv 2310.20703 (there R = 1).

    The constant 6 and the form for R other than 1 are re-derived here,
    not quoted. With a gamma estimated from samples (always too small) it isn't certified.

    Args:
        std: STD, in units of reward.
        length: L, the longest output in tokens.
        gamma: largest spectral norm, over outputs and positions, of the Jacobian of the next-token logits in the
            parameters.
        half_range: R, half the range of the rewards.
    """
    return 6 * length * gamma * half_range ** (1 / 3) * std ** (2 / 3)


def fisher_bound(std: float, eigenvalue: float) -> float:
    """STD sqrt(lambda_max(F)) >= ||grad V||, for any rewards [derived]; equal for two tokens at even odds.

    Args:
        std: STD, in units of reward.
        eigenvalue: lambda_max(F), 1/parameter^2.
    """
    return std * math.sqrt(eigenvalue)


def trace_bound(std: float, trace: float) -> float:
    """STD sqrt(tr F) >= STD sqrt(lambda_max(F)) >= ||grad V||, for any rewards [derived].

    tr F is an expectation, so samples estimate it without bias; no gamma and no length is needed.

    Args:
        std: STD, in units of reward.
        trace: tr F = E|S|^2, 1/parameter^2.
    """
    return std * math.sqrt(trace)


def length_bound(std: float, length: float, gamma: float) -> float:
    """STD gamma sqrt(L) >= STD sqrt(tr F) >= ||grad V|| [derived]; always below `paper_bound`.

    Args:
        std: STD, in units of reward.
        length: L, the longest output in tokens.
        gamma: as in `paper_bound`.
    """
    return std * gamma * math.sqrt(length)


def ppo_bound(std: float, eigenvalue: float, baseline_error: float = 0.0) -> float:
    """sqrt(lambda_max(F) (STD^2 + (V-b)^2)) >= the norm of PPO's clipped surrogate gradient [derived].

    For a sequence-level ratio, any clip, any sampling policy, and the advantage r - b with one b per prompt
    (not for token-level GAE); F, STD and V under the current policy.

    Args:
        std: STD.
        eigenvalue: lambda_max(F).
        baseline_error: V - b.
    """
    return math.sqrt(eigenvalue * (std**2 + baseline_error**2))
