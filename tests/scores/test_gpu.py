"""On a GPU: the same numbers."""

from __future__ import annotations

import pytest
import torch

from entangle.scores import AutogradEngine, FactoredEngine, row_logps
from tests.architectures import random_batch, trainable
from tests.scores.test_architectures import probed_model, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "lora"), ("llama", "all"), ("gpt2", "all"), ("gemma2", "lora"), ("qwen3", "all")],
)
def test_equals_the_oracle_on_the_cpu(name: str, kind: str, share_prompts: bool) -> None:
    """Float64 to 1e-6 (norms drop to float32, where the devices differ); float32 to 1e-5."""
    batch = random_batch()
    exact = probed_model(name, kind)
    expected = AutogradEngine(exact, trainable(exact)).gram(batch)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        model = probed_model(name, kind).to("cuda", dtype)
        engine = FactoredEngine(model, trainable(model), share_prompts=share_prompts)
        assert relative_error(engine.gram(batch), expected) < tolerance
        torch.testing.assert_close(row_logps(model, batch), row_logps(exact, batch), rtol=0, atol=1e-4)
        assert engine.notes == []
