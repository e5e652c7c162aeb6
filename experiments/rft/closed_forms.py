"""Time to fit under gradient flow, in closed form: reinforcement against supervised fine-tuning.

Linear softmax with n orthonormal inputs and K labels, one of them correct with probability p, rewards in {-1,
1}, gradient flow on the mean objective over the inputs, wrong labels equally likely [derived in this
project]:

    RFT: p' = (2/n) p^2 [(1-p)^2 + sum of squared wrong p's]      SFT: p' = (1/n) p [the same]

so p'_RFT / p'_SFT = 2 p. With the std of the reward 2 sqrt(p(1-p)), RFT's time is of the order 1 / STD^2 and
SFT's of ln(1 / STD): the orders that arXiv 2310.20703 states (its theorem's exact constants aren't quoted
here).
"""

from __future__ import annotations

import math


def speed_rft(p: float, labels: int, inputs: int = 1) -> float:
    """Speed p' under RFT, per unit of time."""
    return 2 * p * speed_sft(p, labels, inputs)


def speed_sft(p: float, labels: int, inputs: int = 1) -> float:
    """Speed p' under SFT on the correct label."""
    return p / inputs * ((1 - p) ** 2 + (1 - p) ** 2 / (labels - 1))


def time_rft(start: float, end: float, labels: int, inputs: int = 1) -> float:
    """Time until the correct label's probability has grown from `start` to `end` under RFT.

    n (K-1) / (2K) [Phi(end) - Phi(start)], Phi(p) = -1/p + 1/(1-p) + 2 ln(p / (1-p)).

    Example:
        >>> round(time_rft(0.02, 0.8, labels=2), 6)
        15.821455
    """

    def phi(p: float) -> float:
        return -1 / p + 1 / (1 - p) + 2 * math.log(p / (1 - p))

    return inputs * (labels - 1) / (2 * labels) * (phi(end) - phi(start))


def time_sft(start: float, end: float, labels: int, inputs: int = 1) -> float:
    """The same under SFT: n (K-1) / K [Psi(end) - Psi(start)], Psi(p) = ln(p / (1-p)) + 1/(1-p).

    Example:
        >>> round(time_sft(0.02, 0.8, labels=2), 6)
        4.628853
    """

    def psi(p: float) -> float:
        return math.log(p / (1 - p)) + 1 / (1 - p)

    return inputs * (labels - 1) / labels * (psi(end) - psi(start))
