"""Training with any loss of `losses`, and what a run tells about entanglement: the room that knows TRL."""

from entangle.training.callback import EntanglementCallback
from entangle.training.metrics import STILL_TRAINING, incentives, is_still_training
from entangle.training.trainer import LOSS_OPTIONS, NOT_FOR_THE_MODEL, PreferenceTrainer, TrainingError

__all__ = [
    "EntanglementCallback",
    "LOSS_OPTIONS",
    "NOT_FOR_THE_MODEL",
    "STILL_TRAINING",
    "PreferenceTrainer",
    "TrainingError",
    "incentives",
    "is_still_training",
]
