"""What if: other losses and settings on a finished probe's rows, without the model."""

from entangle.commands.whatif.run import WhatIf, command, run_whatif, what_if

__all__ = ["WhatIf", "command", "run_whatif", "what_if"]
