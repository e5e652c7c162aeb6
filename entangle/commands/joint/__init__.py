"""DPO's signal and RFT's signal on the same prompts, in the same units (`run`); what they are (`measure`)."""

from entangle.commands.joint.run import JointResult, run_joint

__all__ = ["JointResult", "run_joint"]
