"""Models sharded over processes: refused by name and with a way out, since every process sees parts of gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from entangle.errors import UserError
from entangle.scores import make_engine
from tests.architectures import tiny_model, trainable


@pytest.fixture
def mesh(tmp_path) -> Iterator[dist.device_mesh.DeviceMesh]:
    """One gloo process is a mesh of one device."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    os.environ.pop("LOCAL_RANK", None)


@pytest.mark.parametrize("kind", ["auto", "autograd"])
def test_fully_sharded_model_is_refused(mesh, kind) -> None:
    """Its gradients don't arrive where torch.autograd.grad looks for them: without the refusal, wrong or no numbers."""
    model = tiny_model("llama").float().requires_grad_(True)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with pytest.raises(UserError, match="sharded over processes .*Probe the saved checkpoint"):
        make_engine(model, trainable(model), kind)


def test_one_distributed_parameter_is_enough(mesh) -> None:
    """Also one that isn't probed, as in a tensor-parallel model."""
    model = tiny_model("llama").requires_grad_(True)
    weight = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Replicate()]))
    with pytest.raises(UserError, match=r"such as lm_head\.weight"):
        make_engine(model, {"norm": model.model.norm.weight})


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_wrapped_model_is_refused(mesh) -> None:
    """FSDP1, whose parameters are plain tensors: slices of one flat parameter."""
    model = FullyShardedDataParallel(
        tiny_model("llama").float(), device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=True
    )
    with pytest.raises(UserError, match="all of it"):
        make_engine(model, dict(model.named_parameters()))
