"""The ops of examples/third_party on a GPU, called eagerly and from a compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

import fusion_passes
from fusion_passes import registry
from fusion_passes.testing import assert_op
from tests.support import third_party

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not third_party.SOURCE.exists(), reason="needs a checkout"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_ops(dtype: torch.dtype) -> None:
    modules = third_party.modules()
    x = torch.linspace(-200, 200, 100_003).to(dtype)
    assert_op(modules["softcap"].OP, x, 30.0, exact=modules["softcap"].reference)
    assert_op(modules["geglu"].OP, x, torch.sin(x), exact=modules["geglu"].search)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    fusions = {name: module.FUSION for name, module in third_party.modules().items()}
    monkeypatch.setattr(registry, "_fusions", {**registry.known(), **fusions})

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        product = x @ x.mT
        return 30 * torch.tanh(product / 30) @ y, (y @ y.mT) * gelu(product, approximate="tanh")

    x, y = torch.randn(1000, 64, device="cuda") * 4, torch.randn(1000, 64, device="cuda")
    options: dict[str, Any] = {f"fusion_passes.{name}": True for name in ("strict", "verify")}
    options["fusion_passes.fusions"] = ",".join(fusions)
    compiled = torch.compile(f, backend="fusion_passes", options=options, dynamic=dynamic)
    torch.testing.assert_close(compiled(x, y), f(x, y), rtol=1e-4, atol=1e-3)
    assert fusion_passes.report().counts == {"geglu": 1, "softcap": 1}
