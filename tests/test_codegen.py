"""The wrapper that Inductor generates around an inlined op: one launch, no opaque call, no copies."""

from __future__ import annotations

import re
import types
from typing import Any

import pytest
import torch
from torch._inductor import ir
from torch._inductor.virtualized import V

from fusion_passes import lowering
from fusion_passes.lowering import inlining
from fusion_passes.ops import gate_cumsum as gate_module
from tests.support import fake_cuda
from tests.support.fake_cuda import allocated, body, launches

OP = torch.ops.fusion_passes.gate_cumsum.default


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


def layer(x: torch.Tensor, weight: torch.Tensor, a_log: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A projection whose second half is the gate, and a consumer of the sums."""
    tokens = x.shape[1]
    wide = torch.ops.aten.mm.default(x.view(tokens, 256), weight).view(1, tokens, 2, 4, 64)
    raw = wide[:, :, 1:]
    a = a_log.view(1, 4, 1).expand(1, 4, 64)
    chunks = (tokens + 63) // 64
    sums = OP(raw, a, bias.view(1, 4, 64), chunks, 64, None, 1.0, 1.0, 20.0, False, "bhnck", None, None)
    return torch.ops.aten.exp.default(sums)


def arguments(tokens: int = 512) -> list[torch.Tensor]:
    x, weight = torch.randn(1, tokens, 256), torch.randn(256, 512)
    return [x.bfloat16(), weight.bfloat16(), torch.randn(4), torch.randn(256)]


@pytest.mark.parametrize("dynamic", [(), (0,)])
def test_one_launch_and_no_copies(dynamic: tuple[int, ...]) -> None:
    code = fake_cuda.wrapper_code(layer, arguments(), dynamic=dynamic)
    assert len(launches(code, "gate_cumsum_kernel")) == 1
    assert "torch.ops.fusion_passes" not in code
    # Beside it: the projection and one pointwise kernel for exp; the gate's input and weights go in as they are.
    assert len(launches(code, "triton_")) == 1, body(code)
    assert len([line for line in body(code) if "extern_kernels.mm(" in line]) == 1
    assert not any(word in code for word in ("clone", "copy_(", "aten.copy"))
    assert len(allocated(code)) <= 3, allocated(code)


def test_buffers_are_passed_without_new_views() -> None:
    (launch,) = launches(fake_cuda.wrapper_code(layer, arguments()), "gate_cumsum_kernel")
    assert "reinterpret_tensor" not in launch
    # The gate is the second half of each projected row: its offset is a number.
    assert re.search(r"\b256\b", launch)


def test_symbolic_tokens_stay_run_time_arguments() -> None:
    code = fake_cuda.wrapper_code(layer, arguments(), dynamic=(0,))
    (launch,) = launches(code, "gate_cumsum_kernel")
    assert re.search(r"\bs\d+\b", launch)
    assert "512," not in launch.split(",")[0]


def test_warps_and_constants_reach_the_kernel() -> None:
    code = fake_cuda.wrapper_code(layer, arguments())
    definition = code[code.index("gate_cumsum_kernel") :]
    assert "num_warps" in definition and "'ROWS'" in definition and "'LANES'" in definition
    assert "log2_1p_exp2" in definition


def test_packed_sequences_are_inlined() -> None:
    def packed(raw: torch.Tensor, a_log: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return OP(raw, a_log, None, 1, 64, None, 1.0, 1.0, 20.0, False, "bnchk", bounds, None) * 2

    raw, a_log = torch.randn(1, 500, 1, 4, 64).bfloat16(), torch.randn(1, 4, 64)
    for dynamic in ((), (0,)):
        code = fake_cuda.wrapper_code(packed, [raw, a_log, torch.tensor([0, 100, 500])], dynamic=dynamic)
        assert len(launches(code, "gate_cumsum_kernel")) == 1
        assert len(launches(code, "triton_")) == 1


def test_inlining_can_be_switched_off() -> None:
    with inlining(False):
        code = fake_cuda.wrapper_code(layer, arguments())
    assert launches(code, "gate_cumsum_kernel") == []
    assert "torch.ops.fusion_passes.gate_cumsum.default(" in code


def test_views_of_another_dtype_keep_their_view() -> None:
    def bits(raw: torch.Tensor, a_log: torch.Tensor) -> torch.Tensor:
        return OP(raw.view(torch.bfloat16), a_log, None, 2, 64, None, 1.0, 1.0, 20.0, False, "bnchk", None, None)

    raw = torch.zeros(1, 128, 1, 4, 64, dtype=torch.int16)
    code = fake_cuda.wrapper_code(bits, [raw, torch.randn(1, 4, 64)])
    assert len(launches(code, "gate_cumsum_kernel")) == 1
    assert "'raw_ptr': '*bf16'" in code


def test_the_op_has_a_lowering() -> None:
    from torch._inductor.lowering import lowerings

    assert gate_module.OP in lowerings


def test_only_the_output_counts_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written = fake_cuda.written_arguments(monkeypatch)
    fake_cuda.wrapper_code(layer, arguments())
    assert written == [["out_ptr"]]


@pytest.mark.parametrize("dynamic", [(), (0,)])
def test_a_result_lies_as_its_reader_sees_it(dynamic: tuple[int, ...]) -> None:
    """Where a view is all that reads a result, no view is made; the second of two readers sees one."""
    aten = torch.ops.aten

    def sums(raw: torch.Tensor, a_log: torch.Tensor) -> torch.Tensor:
        chunks = raw.shape[1] // 64
        return OP(raw, a_log, None, chunks, 64, None, 1.0, 1.0, 20.0, False, "bnchk", None, None)

    def once(raw: torch.Tensor, a_log: torch.Tensor) -> torch.Tensor:
        return aten.view.default(aten.reshape.default(sums(raw, a_log), (-1, 4, 64)), (1, -1, 256))

    def twice(raw: torch.Tensor, a_log: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = sums(raw, a_log)
        return aten.view.default(found, (-1, 64)), aten.view.default(found, (1, -1, 256))

    inputs = [torch.randn(1, 512, 1, 4, 64).bfloat16(), torch.randn(1, 4, 64)]
    code = fake_cuda.wrapper_code(once, inputs, dynamic=dynamic)
    (buffer,) = allocated(code)
    assert re.search(r"\(\(1, .+, 256\), \(", buffer) and "reinterpret_tensor(" not in code[code.index("def call(") :]
    code = fake_cuda.wrapper_code(twice, inputs, dynamic=dynamic)
    assert re.search(r"64, 4, 64\), \(", allocated(code)[0]) and code.count("reinterpret_tensor(buf") == 2


def test_kernels_learn_the_short_way() -> None:
    code = fake_cuda.wrapper_code(layer, arguments())
    assert "gate_cumsum_kernel_0 = straight(async_compile.triton('gate_cumsum_kernel', '''" in code
    # Inductor's own are its business, and the wrapper runs without this package.
    assert code.count("straight(async_compile.triton(") == 1

    def twice(raw: torch.Tensor, a_log: torch.Tensor) -> torch.Tensor:
        sums = (OP(raw, a_log, None, 512 // c, c, None, 1.0, 1.0, 20.0, False, "bnchk", None, None) for c in (64, 32))
        return sum(s.sum() for s in sums)

    code = fake_cuda.wrapper_code(twice, [torch.randn(1, 512, 1, 4, 64).bfloat16(), torch.randn(1, 4, 64)])
    assert code.count("straight(async_compile.triton(") == 2 and code.count("except ImportError:") == 1


@pytest.mark.parametrize("kind", ["cpp_wrapper", "fx_wrapper"])
def test_wrappers_that_are_no_python_programs_launch_in_their_own_way(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    defined: list[str] = []
    wrapper = types.SimpleNamespace(define_kernel=lambda name, body: defined.append(body))
    launch = object.__new__(lowering._KernelLaunch)
    launch.kwargs = {"PDL": True}
    body = "async_compile.triton('k', triton_meta={})"
    monkeypatch.setattr(ir.UserDefinedTritonKernel, "codegen", lambda self, wrapper: wrapper.define_kernel("k", body))
    graph: Any = types.SimpleNamespace(**{"cpp_wrapper": False, "fx_wrapper": False, kind: True})
    with V.set_graph_handler(graph):
        launch.codegen(wrapper)
    assert defined == ["async_compile.triton('k', triton_meta={'launch_pdl': True, })"]
