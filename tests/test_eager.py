"""Eager calls of an op: checked and planned once for each look of the arguments, with kernels that are stand-ins."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch

from fusion_passes import arch, config, eager, tuning
from fusion_passes.plans import Launch, Operand, Output, Program, Target

Tensor = torch.Tensor


class Kernel:
    """Writes x * factor, or x + 1 where that is 0, and remembers how it was launched: looked up, or as a binary."""

    arg_names = ("out", "x", "factor", "PDL")

    def __init__(self) -> None:
        self.launched: list[tuple[Any, dict[str, Any]]] = []
        self.direct: list[Any] = []
        self.watched: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*, x: Tensor, out: Tensor, factor: float, PDL: bool, **options: Any) -> Binary:
            self.launched.append((grid, options))
            out.copy_(x * factor if factor else x + 1)
            return Binary(self, factor, PDL)

        return launch


class Binary:
    """What a launch of the kernel was compiled to, for its constants."""

    def __init__(self, kernel: Kernel, *constants: Any) -> None:
        self.kernel, self.constants = kernel, constants

    function, packed_metadata = 99, (4, 1, 0)

    def run(self, *args: Any) -> None:
        *launch, out, x, factor, dependent = args
        assert launch[3:] == [7, 99, (4, 1, 0), None, None, None] and (factor, dependent) == self.constants
        self.kernel.direct.append(tuple(launch[:3]))
        out.copy_(x * factor if factor else x + 1)

    def __getitem__(self, grid: Any) -> Any:
        self.kernel.watched.append(grid)
        return lambda *args: self.run(*grid, 7, 99, (4, 1, 0), None, None, None, *args)


class Op:
    """An op of two launches: how often it was checked and planned, and a call of it."""

    def __init__(self) -> None:
        self.kernel, self.checked, self.planned = Kernel(), 0, 0
        self.call = eager.launcher(self.fake, self.plan)

    def fake(self, x: Tensor, factor: float, sizes: list[int]) -> Tensor:
        self.checked += 1
        if x.dim() != 2:
            raise ValueError(f"x must have two axes, got {x.dim()}")
        return torch.empty_like(x)

    def plan(self, target: Target, x: Operand, factor: float, sizes: list[int]) -> Program:
        assert isinstance(x, Operand) and target.hint(sizes[0]) == sizes[0]
        self.planned += 1
        between, out = (Output(x.shape, x.strides, x.dtype) for _ in range(2))
        first = {"x": x, "out": between, "factor": factor, "PDL": True}
        second = {"x": between, "out": out, "factor": 0.0, "PDL": False}
        return Program((Launch(self.kernel, (2,), first, 4), Launch(self.kernel, (3,), second, 8, 2)), (out,))


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Op:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr("fusion_passes.arch.of_device", lambda device: arch.by_name("sm_90"))
    return Op()


def test_calls_that_look_alike_are_planned_once(op: Op) -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    results = [op.call(x, 2.0, [1, 2]) for x in (first, second, first)]
    assert (op.checked, op.planned, len(op.kernel.launched)) == (1, 1, 2)
    assert op.kernel.direct == [(2, 1, 1), (3, 1, 1)] * 2
    for x, found in zip((first, second, first), results):
        assert torch.equal(found, x * 2 + 1)
    assert len({found.data_ptr() for found in results}) == 3


def test_binaries_are_for_aligned_tensors(op: Op) -> None:
    memory = torch.randn(20)
    aligned, shifted = memory[:12].view(3, 4), memory[1:13].view(3, 4)
    for x, launched, direct in ((shifted, 2, 0), (aligned, 4, 0), (shifted, 6, 0), (aligned, 6, 2), (shifted, 8, 2)):
        assert torch.equal(op.call(x, 2.0, [1]), x * 2 + 1)
        assert (len(op.kernel.launched), len(op.kernel.direct)) == (launched, direct)


def test_hooks_of_triton_hear_of_binaries_too(op: Op) -> None:
    knobs = pytest.importorskip("triton.knobs")
    for watching, watched in ((False, 0), (False, 0), (True, 2), (False, 2)):
        hook = knobs.runtime.launch_exit_hook
        if watching:
            hook.add(print)
        try:
            assert torch.equal(op.call(torch.ones(3, 4), 2.0, [1]), torch.full((3, 4), 3.0))
        finally:
            hook.remove(print)
        assert len(op.kernel.watched) == watched
    assert len(op.kernel.direct) == 6


def test_what_the_plan_writes_is_what_the_op_returns(op: Op) -> None:
    op.call = eager.launcher(lambda x, *rest: x.new_empty(x.shape[::-1]), op.plan)
    with pytest.raises(RuntimeError, match=r"writes \[\(\(3, 4\), .* returns \[\(\(4, 3\), "):
        op.call(torch.ones(3, 4), 2.0, [1])


def test_launches_get_their_options(op: Op) -> None:
    op.call(torch.ones(1, 1), 2.0, [1])
    first, second = op.kernel.launched
    assert first == ((2,), {"num_warps": 4, "num_stages": 1, "launch_pdl": True})
    assert second == ((3,), {"num_warps": 8, "num_stages": 2})


@pytest.mark.parametrize(
    "args",
    [
        (torch.ones(4, 3), 2.0, [1]), (torch.ones(4, 3).mT, 2.0, [1]), (torch.ones(3, 4).double(), 2.0, [1]),
        (torch.ones(3, 4), 2, [1]), (torch.ones(3, 4), 3.0, [1]), (torch.ones(3, 4), 2.0, [2]),
        (torch.ones(3, 4), 2.0, [True]), (torch.ones(3, 4), 2.0, [1, 1]),
    ],
    ids=["shape", "strides", "dtype", "integer", "number", "size", "switch", "sizes"],
)  # fmt: skip
def test_what_looks_different_is_planned_anew(op: Op, args: tuple[Any, ...]) -> None:
    op.call(torch.ones(3, 4), 2.0, [1])
    assert torch.equal(op.call(*args), args[0] * args[1] + 1)
    assert (op.checked, op.planned) == (2, 2)


def test_the_two_zeros_look_different(op: Op) -> None:
    for factor in (1e-30, -1e-30, 0.0, -0.0, 0.0):
        op.call(torch.ones(3, 4), factor, [1])
    assert op.planned == 4


def test_forced_parameters_are_planned_for(op: Op) -> None:
    x = torch.ones(3, 4)
    op.call(x, 2.0, [1])
    with tuning.overriding(gate_cumsum="rows=16"):
        op.call(x, 2.0, [1])
        op.call(x, 2.0, [1])
    assert op.planned == 3
    with config.patch(launch="gate_cumsum: rows=16"):
        op.call(x, 2.0, [1])
    assert op.planned == 4
    op.call(x, 2.0, [1])
    assert op.planned == 4


def test_no_tensor_is_kept(op: Op) -> None:
    x = torch.ones(3, 4)
    gone = weakref.ref(x)
    out = weakref.ref(op.call(x, 2.0, [1]))
    del x
    assert gone() is None and out() is None and op.planned == 1


def test_bad_arguments_are_errors_every_time(op: Op) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="x must have two axes, got 1"):
            op.call(torch.ones(3), 2.0, [1])
    assert op.checked == 2 and not op.planned


def test_empty_results_need_no_launch(op: Op) -> None:
    assert op.call(torch.ones(0, 4), 2.0, [1]).shape == (0, 4)
    assert not op.planned and not op.kernel.launched


def test_the_number_of_looks_is_bounded(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "MOST_PREPARED", 2)
    op.call = eager.launcher(op.fake, op.plan)
    for width in (1, 2, 3, 1):
        op.call(torch.ones(1, width), 2.0, [1])
    assert op.planned == 4


def test_an_op_without_results_writes_into_its_first_argument(op: Op) -> None:
    def plan(target: Target, x: Operand, factor: float) -> Launch:
        op.planned += 1
        return Launch(op.kernel, (1,), {"x": x, "out": x, "factor": factor, "PDL": False}, 4)

    call = eager.launcher(lambda x, factor: None, plan)
    for x in (torch.randn(3, 4), torch.randn(3, 4), torch.ones(0, 4)):
        expected = x * 2
        assert call(x, 2.0) is None
        assert torch.equal(x, expected)
    assert (op.planned, len(op.kernel.launched), len(op.kernel.direct)) == (1, 1, 1)
