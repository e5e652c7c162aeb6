"""TRL's DPOTrainer with any loss of `losses`.

`PreferenceTrainer` is TRL's DPOTrainer with its `compute_loss` replaced: TRL's stated way to bring a loss of
one's own. Everything else stays TRL's: data, collation, reference model, adapters, scheduling, distribution.
What this file takes for granted about TRL stands in tests/training/test_trl_contract.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from entangle.errors import UserError
from entangle.training.metrics import pair_metrics, token_metrics
from losses import CATALOGUE, DPO, MissingTokens, PairLogps, PreferenceLoss, TokenLogps, build

try:
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]
except ImportError as error:
    raise ImportError("entangle.training needs TRL 1.16 or newer: pip install 'trl>=1.16,<2'.") from error

LOSS_OPTIONS = (
    "loss_type",
    "loss_weights",
    "label_smoothing",
    "ld_alpha",
    "use_weighting",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
)
"""Fields of DPOConfig that choose or change TRL's own losses; here the loss object says these things."""

NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
"""Columns of TRL's batch that the model's forward doesn't take."""


class TrainingError(UserError):
    """A run can't be set up as asked: the message says what was expected, what came and what to do."""


class PreferenceTrainer(DPOTrainer):
    """TRL's DPOTrainer with any preference loss: L = mean over the micro-batch of `loss.per_pair`.

    Laws: with `DPO(beta)` a run is bit-identical to TRL's `loss_type="sigmoid"`. A loss that needs no
    reference causes no reference forward and no reference model.

    - **Averages.** Like TRL's DPO losses, the micro-batch mean is averaged over accumulation steps and
      processes. TRL's ORPO, CPO and SFT trainers average some terms over a batch's tokens instead; `orpo` and
      `sft` here are means over pairs, as `losses` says (`sft_batch` is TRL's `sft`).
    - **Batch-coupled losses** see the micro-batch of one process, as in TRL: `per_device_train_batch_size`
      is a hyper-parameter of theirs.
    - **Token-weighted losses** get per-token log-probs of policy and reference, and for WPO the sum of
      squared probabilities. What needs more of a next-token distribution (TDPO's KL) is refused: TRL builds
      no logits.
    - **Score gaps** aren't in TRL's batches: `odpo` and its like use the gap that the loss object holds.

    Logged under TRL's names, with TRL's meaning: `logps/*` (means over pairs of sums over tokens), `entropy`,
    `logits/*`, `mean_token_accuracy`, `num_tokens`, and where reference log-probs are at hand `rewards/*`
    (beta times the summed log-ratio; beta is the loss's, or args.beta for a loss without one). In addition,
    as means over pairs:

    - `entangle/logps_per_token/chosen`, `.../rejected`: nats per scored token;
    - `entangle/incentive_chosen`, `entangle/incentive_rejected`: incentives d_w and d_l (`incentives`);
    - `entangle/still_training`: the share of pairs that still train (`is_still_training`).

    Args:
        model: as in DPOTrainer.
        ref_model: as in DPOTrainer.
        args: as in DPOConfig, with the options that belong to the loss (`LOSS_OPTIONS`) at their defaults.
        loss: a loss, its name, or `{"name": "simpo", "beta": 2.0}`; None is `DPO(beta=args.beta)`.
        options: the other arguments of DPOTrainer, by name.

    Raises:
        TrainingError: an option contradicts the loss, or the loss reads what training can't give it.
        UnknownLoss: no loss of this name, or no such hyper-parameter.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *,
        loss: PreferenceLoss | str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        args = DPOConfig() if args is None else args
        self.loss = DPO(beta=args.beta) if loss is None else build(loss)
        self.reward_beta: float = self.loss.config.get("beta", args.beta)
        check_options(args, self.loss)
        if reads_collisions(self.loss):
            args = copy.copy(args)
            args.use_weighting = True  # no more than: TRL's head gives ln sum_v p_v^2 too
        keeps_reference = self.loss.needs_reference or args.precompute_ref_log_probs or args.sync_ref_model
        is_placeholder = ref_model is None and not keeps_reference
        stand_in: Any = _NoReference() if is_placeholder else ref_model
        super().__init__(model, stand_in, args, **options)
        if is_placeholder:
            self.ref_model = None
        if self.loss.name != "dpo":  # what the model card says
            self._name, self._paper = f"the loss {self.loss.label}", {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a micro-batch (chosen rows first, then rejected); its metrics go into TRL's buffer."""
        output = self._forward(model, inputs)
        logps = self._pair_logps(output, inputs)
        loss = self.loss.per_pair(logps).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * output.aux_loss
        self._record(output, logps, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():  # for `compute_metrics`, which reads logits: the fused head builds none
            return loss, model(**_columns(inputs))

    def _forward(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """The policy's output at every position: `log_probs` and what else TRL's fused head gives."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return model(**_columns(inputs), **router, labels=labels, fused_lm_head=True)

    def _pair_logps(self, output: Any, inputs: dict[str, Any]) -> PairLogps:
        """The micro-batch as the loss reads it; lengths are at least 1, so an empty response's mean is 0."""
        mask = inputs["completion_mask"][:, 1:]  # (2B, T-1): the first token has nothing before it
        rows, reference = output.log_probs[:, -mask.shape[1] :], self._reference_rows(inputs)
        if self.loss.needs_tokens:
            halves = {"": rows, "mask_": mask, "ref_": reference}
            if output.log_sum_sq_probs is not None:
                halves["log_collision_"] = output.log_sum_sq_probs[:, -mask.shape[1] :]
            return TokenLogps(**_by_side(halves)).pairs()
        reference = None if reference is None else reference.sum(1)
        if self.precompute_ref_logps:
            reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        halves = {"": rows.sum(1), "length_": mask.sum(1).clamp(min=1), "ref_": reference}
        return PairLogps(**_by_side(halves))

    def _reference_rows(self, inputs: dict[str, Any]) -> Tensor | None:
        """The reference's per-token log-probs, `(2B, T-1)`: what TRL's public method sums up."""
        if self.precompute_ref_logps or not self.loss.needs_reference:
            return None
        model: Any = self.model if self.ref_model is None else self.ref_model
        kept: list[Tensor] = []

        def reference(**columns: Any) -> Any:
            output = model(**columns)
            kept.append(output.log_probs[:, -(inputs["input_ids"].shape[1] - 1) :])
            return output

        self.compute_ref_log_probs(reference, inputs)
        return kept[0]

    @torch.no_grad()
    def _record(self, output: Any, logps: PairLogps, inputs: dict[str, Any]) -> None:
        """Append the micro-batch's metrics, taken over all processes with one reduction, to TRL's buffer."""
        policy: Any = self.model
        mode = "train" if policy.training else "eval"
        mask = inputs["completion_mask"][:, 1:]
        metrics = token_metrics(output, mask) | pair_metrics(self.loss, logps, self.reward_beta)
        sums = [torch.stack([(v.float() * w).sum(), w.float().sum()]) for v, w in metrics.values()]
        total: Any = self.accelerator.reduce(torch.stack(sums), "sum")
        for name, value in zip(metrics, (total[:, 0] / total[:, 1].clamp(min=1)).tolist(), strict=True):
            self._metrics[mode][name].append(value)
        if mode == "train":
            count: Any = self.accelerator.reduce(inputs["attention_mask"].sum(), "sum")
            self._total_train_tokens += int(count) // int(self._tp_size or 1)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


class _NoReference(nn.Module):
    """Stands in TRL's constructor where no reference is wanted, so that TRL loads or copies none."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.unused = nn.Parameter(torch.zeros(1))  # a sharding wrapper wants something to shard

    def forward(self) -> None:
        """Never called."""


def check_options(args: DPOConfig, loss: PreferenceLoss) -> None:
    """Refuse options of DPOConfig that the loss would silently ignore or contradict.

    Args:
        args: the trainer's.
        loss: the trained loss.

    Raises:
        TrainingError: names the option, its value and where to say it instead.
    """
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)
    }
    for option in LOSS_OPTIONS:
        value = getattr(args, option)
        if value != defaults[option]:
            raise TrainingError(
                f"args.{option}={value!r} belongs to the loss, and this run trains {loss.label}. Leave it at "
                f"{defaults[option]!r} and say it in loss=; related losses: {_related(option, value)}."
            )
    if args.beta not in (defaults["beta"], loss.config.get("beta", args.beta)):
        raise TrainingError(
            f"args.beta={args.beta} contradicts the loss {loss.label}, whose beta is {loss.config['beta']}. "
            f"Give beta in the loss only: loss={{'name': {loss.name!r}, 'beta': {args.beta}}}."
        )
    if loss.needs_tokens and args.precompute_ref_log_probs:
        raise TrainingError(
            f"Loss {loss.name!r} reads the reference's log-prob of every token, and "
            "precompute_ref_log_probs=True keeps sums only. Set it to False."
        )


def reads_collisions(loss: PreferenceLoss) -> bool:
    """Whether the loss reads ln sum_v p_v^2 of the policy's next-token distributions; found by trying it.

    Raises:
        TrainingError: it reads a per-token statistic that training can't give.
    """
    if not loss.needs_tokens:
        return False
    ones = torch.ones(2, 2)
    tokens = TokenLogps(**_by_side(dict.fromkeys(("", "mask_", "ref_"), ones.repeat(2, 1))))
    collisions = {"log_collision_chosen": ones, "log_collision_rejected": ones}
    for given in ({}, collisions):
        try:
            loss.per_pair(replace(tokens, **given).pairs())
        except MissingTokens as error:
            reason = error
        else:
            return bool(given)
    raise TrainingError(
        f"PreferenceTrainer can't train {loss.label}. {reason} TRL's fused LM head builds no logits, so only "
        "the tokens' log-probs and log_collision are at hand: write the loop by hand (losses.as_function)."
    )


def _columns(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's forward takes of a batch."""
    return {k: v for k, v in inputs.items() if k not in NOT_FOR_THE_MODEL} | {"use_cache": False}


def _by_side(columns: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """Batch columns `(2B, ...)` by prefix as two fields each: "mask_" -> mask_chosen."""
    sides: dict[str, Any] = {}
    for prefix, column in columns.items():
        if column is not None:
            for side, half in zip(("chosen", "rejected"), column.chunk(2), strict=True):
                sides[prefix + side] = half
    return sides


def _related(option: str, value: Any) -> str:
    """Names of the losses that say what an option of TRL says."""
    if option == "loss_type":
        return ", ".join(name for name, cls in CATALOGUE.items() if cls.trl in value) or "weighted_sum"
    words = {name: {*cls.trl_options, *(f.name for f in fields(cls))} for name, cls in CATALOGUE.items()}
    return ", ".join(name for name in words if option in words[name] or option in (CATALOGUE[name].trl or ""))
