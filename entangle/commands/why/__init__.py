"""Why a past run's log-probs fell: its log, its checkpoints and its pairs, in one go."""

from entangle.commands.why.run import WhyResult, run_why

__all__ = ["WhyResult", "run_why"]
