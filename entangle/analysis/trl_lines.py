"""A loss as the lines of TRL's DPOConfig that train with it, where TRL has it."""

from __future__ import annotations

from dataclasses import fields

from losses import PreferenceLoss, WithSFT


def trl_lines(loss: PreferenceLoss) -> list[str] | None:
    """Lines of a YAML file for `trl dpo`; None where its DPOTrainer has no such loss.

    A loss with an NLL term is there only with TRL's normaliser, per chosen token of the batch (`sft_batch`).

    Args:
        loss: the loss.

    Examples:
        >>> from losses import DPO, SFTBatch
        >>> trl_lines(WithSFT(DPO(), alpha=0.5, sft=SFTBatch()))
        ['loss_type: [sigmoid, sft]', 'loss_weights: [1.0, 0.5]', 'beta: 0.1']
    """
    if isinstance(loss, WithSFT):
        inner = trl_lines(loss.loss)
        if inner is None or loss.sft.name != "sft_batch":
            return None
        name = inner[0].removeprefix("loss_type: [").rstrip("]")
        return [f"loss_type: [{name}, sft]", f"loss_weights: [1.0, {loss.alpha:g}]", *inner[1:]]
    if not loss.trl or not loss.trl.replace("_", "").isalnum() or not loss.trl.islower():
        return None
    theirs = {ours: trl for trl, ours in loss.trl_options.items()}
    settings = {theirs.get(field.name, field.name): getattr(loss, field.name) for field in fields(loss)}
    return [f"loss_type: [{loss.trl}]", *(f"{name}: {value:g}" for name, value in settings.items())]
