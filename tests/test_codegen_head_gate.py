"""The wrapper that Inductor generates for a model that projects its head weights: one launch, nothing upcast."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_passes.graph_pass import FusionPass
from fusion_passes.ops._head_gate_kernel import TOKEN
from fusion_passes.settings import snapshot
from tests.support import fake_cuda
from tests.support.fake_cuda import allocated, body

COLUMNS, HEADS = 7168, 64


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


def hugging_face(x: Tensor, weight: Tensor) -> Tensor:
    """The spelling of `transformers`: weights in float32, activations upcast to them."""
    return torch.nn.functional.linear(x.to(weight.dtype), weight).float() * HEADS**-0.5


def engine(x: Tensor, weight: Tensor, q_scale: Tensor) -> Tensor:
    """The spelling of a serving engine: a bfloat16 projection, scaled and multiplied by the scales of the queries."""
    weights = torch.nn.functional.linear(x, weight) * HEADS**-0.5
    return weights.unsqueeze(-1) * q_scale * 128**-0.5


def heads_first(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(weight, x.mT) * 0.125


def arguments(tokens: int, weights: torch.dtype, with_scale: bool = False) -> list[Tensor]:
    found = [torch.randn(1, tokens, COLUMNS).bfloat16(), torch.randn(HEADS, COLUMNS).to(weights)]
    return [*found, torch.rand(1, tokens, HEADS, 1)] if with_scale else found


def code_of(function: Callable[..., Any], args: list[Tensor], dynamic: tuple[int, ...] = ()) -> str:
    ours = FusionPass(snapshot({"strict": True, "fusions": "head_gate"}))
    return fake_cuda.wrapper_code(function, args, dynamic=dynamic, options={"post_grad_custom_pre_pass": ours})


def launches(code: str) -> list[str]:
    return [line for line in body(code) if ".run(" in line or "extern_kernels." in line]


@pytest.mark.parametrize(
    "weights, tokens, dynamic",
    [
        (torch.bfloat16, 1, ()),
        (torch.float32, 1, ()),
        (torch.float32, 64, ()),
        (torch.bfloat16, 2048, (0,)),
        (torch.float32, 2048, (0,)),
    ],
)
def test_one_launch_and_no_upcast_copy(weights: torch.dtype, tokens: int, dynamic: tuple[int, ...]) -> None:
    code = code_of(hugging_face, arguments(tokens, weights), dynamic)
    (launch,) = launches(code)
    assert launch.startswith("head_gate_row_kernel" if tokens == 1 else "head_gate_kernel")
    assert "torch.ops.fusion_passes" not in code
    # The result, and where programs share the depth their sums and flags.
    assert len(allocated(code)) == (1 if tokens == 1 else 3)
    assert not [line for line in allocated(code) if str(COLUMNS) in line]


def test_without_the_pass_there_is_a_copy_and_a_pointwise_launch() -> None:
    code = fake_cuda.wrapper_code(hugging_face, arguments(64, torch.float32))
    assert len(launches(code)) == 3 and [line for line in allocated(code) if str(COLUMNS) in line]


@pytest.mark.parametrize("dynamic", [(), (0, 2)])
def test_scales_of_the_queries(dynamic: tuple[int, ...]) -> None:
    code = code_of(engine, arguments(64, torch.bfloat16, with_scale=True), dynamic)
    (launch,) = launches(code)
    assert launch.startswith("head_gate_kernel")
    constants = code[: code.index("def call(")]
    assert re.search(r"'ROUND_TO': 'bfloat16'", constants)
    assert re.search(rf"'SCALE': {re.escape(str(HEADS**-0.5 * 128**-0.5)[:12])}", constants)


def test_heads_first() -> None:
    code = code_of(heads_first, arguments(300, torch.bfloat16))
    (launch,) = launches(code)
    assert launch.startswith("head_gate_kernel") and re.search(r"'HEAD_FIRST': True", code)


def test_scratch_memory_of_a_symbolic_number_of_rows() -> None:
    code = code_of(hugging_face, arguments(2048, torch.bfloat16), (0,))
    part, flag = (line for line in allocated(code) if "max(132" in line.replace("Max(", "max(").lower())
    assert "torch.float32" in part and "torch.int64" in flag
    assert f"{TOKEN.value}" in code or hex(TOKEN.value) in code


def test_strides_of_a_compiled_graph_are_constants() -> None:
    constants = code_of(hugging_face, arguments(64, torch.float32)).split("def call(")[0]
    for name, value in {"X_T": COLUMNS, "X_K": 1, "W_H": COLUMNS, "W_K": 1, "H": HEADS, "K": COLUMNS}.items():
        assert re.search(rf"'{name}': {value}\b", constants), name


def test_only_the_result_and_scratch_count_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = fake_cuda.written_arguments(monkeypatch)
    code_of(hugging_face, arguments(64, torch.bfloat16))
    assert written == [["flag_ptr", "out_ptr", "part_ptr"]]
    code_of(hugging_face, arguments(1, torch.bfloat16))
    assert written[1] == ["out_ptr"]
