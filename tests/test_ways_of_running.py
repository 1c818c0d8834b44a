"""Ways of running a model: inference mode, autocast, compiled regions; Inductor's modes are in `test_doors`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fusion_passes

NAME = "gate_cumsum"


class Layer(torch.nn.Module):
    """A projection, and the gate of Kimi delta attention in chunks of 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(64, 64, bias=False)
        self.a_log = torch.nn.Parameter(torch.linspace(-1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        raw = self.proj(x).unflatten(-1, (2, 32))
        gate = -self.a_log.exp()[:, None] * torch.nn.functional.softplus(raw.float())
        return gate.view(x.shape[0], -1, 64, 2, 32).cumsum(2).view(x.shape).to(x.dtype) / 64


@pytest.fixture(autouse=True)
def _on_cpu() -> Any:
    torch._dynamo.reset()
    with fusion_passes.config.patch(reference_on_cpu=True, strict=True, fusions=NAME):
        yield


def compiled(model: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(model, backend="fusion_passes", fullgraph=True)


def found(call: Callable[[], Any]) -> int:
    """Sites that `call` adds to the report."""
    before = fusion_passes.report().counts[NAME]
    call()
    return fusion_passes.report().counts[NAME] - before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference(context: Callable[[], Any]) -> None:
    layer, x = Layer(), torch.randn(2, 128, 64)
    with context():
        assert found(lambda: torch.testing.assert_close(compiled(layer)(x), layer(x))) == 1


def test_autocast() -> None:
    """The projection is rounded to bfloat16, and so read by the fused op."""
    layer, x = Layer(), torch.randn(2, 128, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer.proj(x).dtype == torch.bfloat16
        assert found(lambda: torch.testing.assert_close(compiled(layer)(x), layer(x), rtol=1e-2, atol=1e-3)) == 1


def test_regions_are_compiled_once() -> None:
    """`nn.Module.compile` for each of several equal layers: one graph, one pass over it."""
    model, x = torch.nn.Sequential(*(Layer() for _ in range(4))), torch.randn(2, 128, 64)
    with torch.no_grad():
        expected = model(x)
        counter = CompileCounterWithBackend("fusion_passes")
        for layer in model:
            layer.compile(backend=counter, fullgraph=True)
        assert found(lambda: torch.testing.assert_close(model(x), expected)) == 1
    assert counter.frame_count == 1

