"""The probe: every pair's geometry once, then every loss; in memory, or into a run folder that can be resumed."""

from entangle.commands.probe.memory import probe
from entangle.commands.probe.result import ProbeResult
from entangle.commands.probe.run import command, run_probe

__all__ = ["ProbeResult", "command", "probe", "run_probe"]
