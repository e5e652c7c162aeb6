"""AdamW's state by parameter name: read from real checkpoints of TRL's trainer, and the metric it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from entangle.config import ModelOptions
from entangle.errors import ModelError
from entangle.models import adam_state_of, load_adam_state, load_policy
from tests.training import runs


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A run of three steps with its checkpoint, and the moments that its live optimizer holds by parameter."""
    folder = tmp_path_factory.mktemp(request.param)
    base = runs.policy()
    base.save_pretrained(folder / "base")
    runs.tokenizer().save_pretrained(folder / "base")
    options = {} if request.param == "lora" else {"peft_config": None, "loss": "simpo"}
    args = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    done = runs.trainer(folder, model=base, args=args, **options)
    done.train()
    return folder, done


def load_checkpoint(folder: Path, done, **options):
    checkpoint = folder / "checkpoint-3"
    if isinstance(done.model, PeftModel):
        return load_policy(ModelOptions(folder / "base", adapter_name_or_path=checkpoint, **options))
    return load_policy(ModelOptions(checkpoint, reference="self", **options))


def test_names_are_the_live_optimizers(trained):
    """The checkpoint read without the trainer has, under every name, what the optimizer holds for that parameter."""
    folder, done = trained
    part = r"layers\.0\..*lora_" if isinstance(done.model, PeftModel) else r"layers\.0\."
    policy = load_checkpoint(folder, done, parameters=part)
    state = load_adam_state(folder / "checkpoint-3", policy.model, policy.trained)
    live = {name: p for name, p in done.model.named_parameters() if p.requires_grad}
    assert set(state.exp_avg_sq) == set(live) and state.step == 3
    decays = {p: group["weight_decay"] for group in done.optimizer.param_groups for p in group["params"]}
    for name, parameter in live.items():
        held = done.optimizer.state[parameter]
        assert torch.equal(state.exp_avg_sq[name], held["exp_avg_sq"])
        assert torch.equal(state.exp_avg[name], held["exp_avg"])
        assert state.weight_decay[name] == decays[parameter]
    assert (state.betas, state.eps) == ((0.9, 0.999), 1e-8)
    metric = state.metric(policy.parameters)
    assert set(metric) == set(policy.parameters) and all(bool((p > 0).all()) for p in metric.values())


def test_state_of_another_model_is_refused(trained, tmp_path):
    folder, done = trained
    other = load_policy(ModelOptions(folder / "base", use_peft=True, lora_r=3))
    with pytest.raises(ModelError, match="belongs to another model|doesn't fit the model"):
        load_adam_state(folder / "checkpoint-3", other.model, other.trained)
    with pytest.raises(ModelError, match="Expected a checkpoint folder with optimizer.pt"):
        load_adam_state(tmp_path, other.model)


def test_metric_inverts_the_root_of_the_bias_corrected_moment():
    """With one gradient g at every step v_hat = g^2, so P = 1 / (|g| + eps), and the update is -lr P g = -lr sign."""
    layer = nn.Linear(3, 2, bias=False)
    gradient = torch.tensor([[1.0, -2.0, 0.5], [3.0, -0.1, 4.0]])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, eps=1e-3, weight_decay=0.0)
    for _ in range(4):
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        optimizer.step()
    state = adam_state_of(optimizer.state_dict(), layer)
    metric = state.metric({"weight": layer.weight})["weight"]
    torch.testing.assert_close(metric, 1 / (gradient.abs() + 1e-3))
    torch.testing.assert_close(layer.weight.detach() - before, -0.1 * metric * gradient)


class Loader:
    def __reduce__(self):
        return print, ("ran",)


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save({"state": {}, "param_groups": [Loader()]}, tmp_path / "optimizer.pt")
    with pytest.raises(ModelError, match="tensors and numbers only"):
        load_adam_state(tmp_path, nn.Linear(1, 1))
    assert "ran" not in capsys.readouterr().out


def test_other_optimizers_are_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="state of Adam or AdamW"):
        adam_state_of(torch.optim.SGD(layer.parameters(), lr=0.1).state_dict(), layer)
    groups = [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.2}]
    with pytest.raises(ModelError, match="differ in lr"):
        adam_state_of(torch.optim.AdamW(groups).state_dict(), layer)
    with pytest.raises(ModelError, match="one count of updates"):
        adam_state_of(torch.optim.AdamW(layer.parameters()).state_dict(), layer)
