"""The wrapper that Inductor generates around the systems of a delta rule: one launch, operands read where they lie."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_passes.graph_pass import FusionPass
from fusion_passes.ops.delta_rule_intra import OP
from fusion_passes.settings import snapshot
from tests.patterns.delta_rule_intra_spellings import SPELLINGS
from tests.support import fake_cuda
from tests.support.delta_rule import operands
from tests.support.fake_cuda import allocated, body, launches

KERNEL, STOCK = "delta_rule_intra_per_", "triton_"


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


def code_of(name: str, rounded: bool = False) -> str:
    """One tensor [B, T, ...] holds k, v, beta and q; the log decays come as they are."""
    entry = SPELLINGS[name]
    drawn = operands(
        batch=1, tokens=48, key_heads=entry.key_heads, value_heads=entry.value_heads, key=64, value=64,
        per_channel=entry.per_channel, dtype=torch.bfloat16,
    )  # fmt: skip
    parts = [drawn[name] for name in ("k", "v", "beta", "q")]
    widths = [part[0, 0].numel() for part in parts]

    def run(x: Tensor, decay: Tensor) -> Any:
        k, v, beta, q = (piece.unflatten(-1, part.shape[2:]) for piece, part in zip(x.split(widths, -1), parts))
        results = entry.function(k, v, decay, beta, q)
        return [result.bfloat16() for result in results] if rounded else results

    chosen = FusionPass(snapshot({"strict": True, "fusions": "delta_rule_intra"}))
    args = torch.cat([part.flatten(2) for part in parts], -1), drawn["g"]
    # Folding computes the mask of a triangle on the GPU, which is not there.
    options = {"post_grad_custom_pre_pass": chosen, "joint_graph_constant_folding": False}
    return fake_cuda.wrapper_code(run, args, options=options)


@pytest.mark.parametrize("rounded", [False, True])
def test_one_launch_for_two_systems_and_pairs(rounded: bool) -> None:
    code = code_of("solved_apart", rounded)
    assert len(launches(code, KERNEL)) == 1 and len(launches(code, STOCK)) == 1  # the sums
    assert "torch.ops.fusion_passes" not in code and "extern_kernels" not in "".join(body(code))
    # The sums, u, w and the pairs; the decays between two tokens, [.., C, C], are not formed.
    assert len(allocated(code)) == 4
    assert sum("torch.bfloat16" in line for line in allocated(code)) == (3 if rounded else 0)
    (launch,) = launches(code, KERNEL)
    assert "reinterpret_tensor" not in launch


def test_symbolic_tokens_and_chunks() -> None:
    """One binary for every prompt: tokens and chunks are arguments of the kernel."""

    def run(k: Tensor, v: Tensor, sums: Tensor, beta: Tensor) -> Any:
        form = (0.1, 1e-6, "u,w", False, False, torch.bfloat16)
        return OP(k, v, sums.transpose(1, 2), beta, None, *form)[:2]

    k, v, beta = (torch.randn(1, 100, *rest).bfloat16() for rest in ((2, 64), (4, 128), (4,)))
    code = fake_cuda.wrapper_code(run, (k, v, torch.randn(1, 7, 4, 16), beta), dynamic=(0, 1, 2, 3))
    (launch,) = launches(code, KERNEL)
    assert len(set(re.findall(r"\bs\d+\b", launch))) >= 2 and launches(code, STOCK) == []
    definition = code[code.index(KERNEL) :]
    assert "'HK': 2" in definition and "'HV': 4" in definition and "'C': 16" in definition


def test_only_the_results_count_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = fake_cuda.written_arguments(monkeypatch)
    code_of("solved_apart")
    assert written == [["pairs_ptr", "u_ptr", "w_ptr"]]
