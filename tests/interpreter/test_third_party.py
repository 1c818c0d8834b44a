"""The kernels of examples/third_party under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support import third_party
from tests.support.programs import run

pytestmark = pytest.mark.skipif(not third_party.SOURCE.exists(), reason="needs a checkout")


def test_softcap() -> None:
    module = third_party.modules()["softcap"]
    x = torch.cat([torch.linspace(-200, 200, 1501), torch.linspace(-5, 5, 1500), torch.tensor([torch.inf, -torch.inf])])
    (out,) = run(module.plan, (x, 30.0))
    torch.testing.assert_close(out, module.reference(x.double(), 30.0).float(), rtol=2e-6, atol=0)


def test_geglu() -> None:
    module = third_party.modules()["geglu"]
    gate, up = torch.linspace(-6, 6, 3003).view(3, 1001), torch.linspace(3, -3, 3003).view(3, 1001)
    (out,) = run(module.plan, (gate, up))
    torch.testing.assert_close(out, module.search(gate.double(), up.double()).float(), rtol=1e-5, atol=1e-6)
