"""What AdamW remembers, by parameter name: read from a checkpoint's `optimizer.pt`, and the metric it makes.

Checkpoints number parameters and don't name them. The numbers follow the optimizer's groups: transformers' trainer
(TRL's too) makes two, the parameters with weight decay and then those without, each in the model's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor, nn

from entangle.errors import ModelError

FILES = ("optimizer.pt", "optimizer.bin")


@dataclass(frozen=True)
class AdamState:
    """The state of torch's Adam or AdamW after `step` updates.

    Args:
        step: t, updates so far.
        learning_rate: of the update to come (the scheduler has already set it; 0 at the end of a linear decay).
        betas: decay rates of the two averages.
        eps: added to the root of the second one.
        weight_decay: by parameter name.
        exp_avg: m, average of gradients, by parameter name, in the parameter's shape.
        exp_avg_sq: v, average of squared gradients, likewise.
    """

    step: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: dict[str, float]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]

    def metric(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The diagonal metric P = 1 / (sqrt(v_hat) + eps), v_hat = v / (1 - beta2^t), by parameter name.

        An update without momentum and decay is -learning_rate P g. Positive; in float32 at least.

        Raises:
            ModelError: the optimizer never updated one of `parameters`.
        """
        unknown = [name for name in parameters if name not in self.exp_avg_sq]
        if unknown:
            raise ModelError(
                f"The optimizer holds no second moments for {len(unknown)} of the {len(parameters)} probed "
                f"parameters, such as {unknown[0]}: the training didn't move them. Probe those that it did (leave out "
                "--parameters), or use --metric sgd."
            )
        correction = 1 - self.betas[1] ** self.step
        metric = {}
        for name, parameter in parameters.items():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            metric[name] = 1 / ((self.exp_avg_sq[name].to(dtype) / correction).sqrt() + self.eps)
        return metric


def load_adam_state(path: str | Path, model: nn.Module, trained: Sequence[str] | None = None) -> AdamState:
    """AdamW's state from a checkpoint of transformers' trainer, by parameter name. Nothing is unpickled but tensors.

    Args:
        path: a checkpoint folder with optimizer.pt, or that file.
        model: the model that was trained, with the same adapter.
        trained: names of the parameters that were trained; by default those of `model` that want a gradient.

    Raises:
        ModelError: the file isn't there, isn't Adam's, or belongs to other parameters.
    """
    file = optimizer_file(path)
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        raise ModelError(
            f"Can't read the optimizer state {file}: {type(error).__name__}. Expected what transformers' trainer "
            "saves as optimizer.pt, tensors and numbers only."
        ) from error
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise ModelError(
            f"Expected an optimizer's state_dict in {file} (state, param_groups); it has neither."
        )
    return adam_state_of(saved, model, trained)


def adam_state_of(
    saved: Mapping[str, Any], model: nn.Module, trained: Sequence[str] | None = None
) -> AdamState:
    """AdamW's state by parameter name from `optimizer.state_dict()`; arguments and errors of `load_adam_state`."""
    groups = saved["param_groups"]
    first = groups[0]
    if "betas" not in first or "eps" not in first or first.get("amsgrad"):
        raise ModelError(
            "Expected the state of Adam or AdamW (betas, eps, no amsgrad); got an optimizer with the options "
            f"{', '.join(sorted(set(first) - {'params'}))}. Other optimizers have no such metric: use --metric sgd."
        )
    for option in ("initial_lr", "lr", "betas", "eps"):
        if len({_plain(group.get(option)) for group in groups}) > 1:
            raise ModelError(
                f"The optimizer's groups differ in {option}; one metric needs the same in all of them."
            )
    named = dict(model.named_parameters())
    names = [name for name, p in named.items() if p.requires_grad] if trained is None else list(trained)
    weight_decay: dict[str, float] = {}
    states: dict[str, Mapping[str, Tensor]] = {}
    for group, members in zip(groups, _by_group(groups, names, model), strict=True):
        for number, name in zip(group["params"], members, strict=True):
            weight_decay[name] = float(group.get("weight_decay", 0.0))
            if state := saved["state"].get(number):
                states[name] = _checked(name, named[name], state)
    steps = {int(state["step"]) for state in states.values()}
    if len(steps) != 1:
        raise ModelError(
            f"Expected one count of updates for all parameters; the state has {sorted(steps) or 'none'}."
        )
    return AdamState(
        step=steps.pop(),
        learning_rate=float(first["lr"]),
        betas=cast(Any, tuple(map(float, first["betas"]))),
        eps=float(first["eps"]),
        weight_decay=weight_decay,
        exp_avg={name: state["exp_avg"] for name, state in states.items()},
        exp_avg_sq={name: state["exp_avg_sq"] for name, state in states.items()},
    )


def optimizer_file(path: str | Path) -> Path:
    """The file with the optimizer's state in a checkpoint folder, or that file itself.

    Raises:
        ModelError: there is none.
    """
    given = Path(path).expanduser()
    candidates = [given] if given.is_file() else [given / name for name in FILES]
    for file in candidates:
        if file.is_file():
            return file
    raise ModelError(
        f"Expected a checkpoint folder with optimizer.pt, or that file, at {given}; there is none. Trainers save it "
        "unless save_only_model is set; sharded states (DeepSpeed, FSDP) have to be gathered first."
    )


def _by_group(groups: Sequence[Mapping[str, Any]], names: Sequence[str], model: nn.Module) -> list[list[str]]:
    """Names of the trained parameters in the order of the optimizer's groups."""
    if all("param_names" in group for group in groups):
        members = [list(group["param_names"]) for group in groups]
    elif len(groups) == 1:
        members = [list(names)]
    else:
        from transformers import Trainer  # here: it is heavy, and most runs need no optimizer

        decaying = set(Trainer.get_decay_parameter_names(cast(Any, None), cast(Any, model)))
        members = [[n for n in names if n in decaying], [n for n in names if n not in decaying]]
    counts, expected = [len(group["params"]) for group in groups], [len(part) for part in members]
    if counts != expected or {name for part in members for name in part} != set(names):
        raise ModelError(
            f"The optimizer's groups hold {counts} parameters, and this model has {expected} to train (with weight "
            "decay, without): the state belongs to another model or adapter, or to a run that trained other "
            "parameters."
        )
    return members


def _checked(name: str, parameter: Tensor, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if not {"step", "exp_avg", "exp_avg_sq"} <= set(state):
        raise ModelError(
            f"Expected Adam's moments (step, exp_avg, exp_avg_sq) of {name}; got {', '.join(sorted(state))}. "
            "Quantised and factored optimizers aren't supported: use --metric sgd."
        )
    shape = tuple(state["exp_avg_sq"].shape)
    if shape != tuple(parameter.shape):
        raise ModelError(
            f"The optimizer's state doesn't fit the model: {name} has the shape {tuple(parameter.shape)}, its second "
            f"moments {shape}. Give the checkpoint that this model or adapter was saved with."
        )
    return state


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else float(value) if isinstance(value, Tensor) else value
