"""The short way to a kernel's binary: what it passes on, and when it is left."""

from __future__ import annotations

import pickle
import types
from concurrent.futures import Future
from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, CompileResult, FixedGrid
from torch.autograd import profiler

from fusion_passes import launching
from fusion_passes.launching import StraightAutotuner, straight

pytest.importorskip("triton")

NAMES = ["x_ptr", "none_ptr", "out_ptr", "rows", "one", "BLOCK"]
SIGNATURE = {"x_ptr": "*bf16", "none_ptr": "constexpr", "out_ptr": "*fp32", "rows": "i32", "one": "constexpr",
             "BLOCK": "constexpr"}  # fmt: skip
# What a wrapper passes: constants of the signature as placeholders, declared ones not at all, then the grid.
PASSED = (torch.zeros(1), -1, torch.zeros(2), 7, 1, 30, 20, 10)


class Recorder:
    """Stands for the end of the way: keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


def made(launcher_scope: dict[str, Any], runner_args: list[str], *, static: bool) -> Any:
    """Inductor's object for a kernel, with a launcher that Inductor's own code wrote."""
    kernel = object.__new__(CachingAutotuner)
    source = types.SimpleNamespace(fn=types.SimpleNamespace(arg_names=NAMES), signature=SIGNATURE)
    result: Any = object.__new__(triton_heuristics.TritonCompileResult)
    result.inductor_meta = FixedGrid.setup_grid_as_args()
    result.config = triton_heuristics.Config({}, num_warps=4)
    result.compile_meta = {"constants": {"none_ptr": None, "one": 1, "BLOCK": 64}, "signature": SIGNATURE}
    result.kernel = types.SimpleNamespace(src=source)
    call_args, def_args, _ = CompileResult._get_arg_lists(result, NAMES, [5])
    runner_args = runner_args or ["grid_0", "grid_1", "grid_2", "stream", "function", "metadata",
                                  "bin.launch_metadata()", "enter", "leave", *call_args]  # fmt: skip
    launcher = CompileResult._gen_launcher_code(result, launcher_scope, def_args, runner_args)
    for name, value in {"store_cubin": False, "_is_static": static, "cache_hash": "", "config": result.config}.items():
        setattr(launcher, name, value)
    plain = {
        "launchers": [launcher], "compile_results": [result], "triton_interpret": False, "inductor_meta": {},
        "dump_launch_params": False, "dump_launch_tensors": False, "triton_meta": {}, "cuda_kernel_saved": False,
        "fn": types.SimpleNamespace(__name__="kernel"), "device_props": types.SimpleNamespace(type="cuda"),
        "_cache_eligible": False, "_plugins": [], "lock": None, "_cached_launcher": None,
        "_debug_call": None, "_profiler_ctx": None,
    }  # fmt: skip
    kernel.__dict__.update(plain)
    return kernel


@pytest.fixture
def static() -> tuple[Any, Recorder]:
    """A kernel that Inductor launches by itself, and the driver's end."""
    end = Recorder()
    binary: Any = object.__new__(StaticallyLaunchedCudaKernel)
    binary.__dict__.update(
        function=99, num_warps=4, shared=512, arg_tys="OOi", arg_names=NAMES, full_constexprs=[1, 4, 5],
        has_global_scratch=True, has_profile_scratch=True, C_impl=types.SimpleNamespace(_launch_kernel=end),
    )  # fmt: skip
    used = [name for place, name in enumerate(NAMES) if place not in binary.full_constexprs]
    args = ["grid_0", "grid_1", "grid_2", "stream", *used]
    return made({"runner": binary.run}, args, static=True), end


@pytest.fixture
def dependent() -> tuple[Any, Recorder]:
    """A kernel that Triton launches, and its launcher."""
    from triton import knobs

    end = Recorder()
    scope = {"runner": end, "function": 99, "metadata": (4, 1, 512), "enter": knobs.runtime.launch_enter_hook,
             "leave": knobs.runtime.launch_exit_hook, "bin": mock.Mock()}  # fmt: skip
    return made(scope, [], static=False), end


def calls(kernel: Any, end: Recorder, times: int) -> list[tuple[Any, ...]]:
    """What arrives at the end for so many calls by a wrapper."""
    for _ in range(times):
        kernel.run(*PASSED, stream=5)
    found, end.calls[:] = list(end.calls), []
    return found


def test_the_driver_is_called_as_inductor_calls_it(static: tuple[Any, Recorder], monkeypatch: Any) -> None:
    kernel, end = static
    (wanted,) = calls(kernel, end, 1)
    assert wanted == (99, 30, 20, 10, 4, 512, "OOiOO", (PASSED[0], PASSED[2], 7, None, None), 5)
    assert calls(straight(kernel), end, 3) == [wanted] * 3
    if hasattr(CachingAutotuner, "_build_fast_launcher"):
        assert kernel._short_way() is None  # torch has its own
        kernel.run = kernel._static()
    else:
        assert kernel.run.__name__ == "run" and "run" in kernel.__dict__
    assert calls(kernel, end, 2) == [wanted] * 2


def test_a_dependent_launch_gathers_nothing_for_hooks(dependent: tuple[Any, Recorder]) -> None:
    kernel, end = dependent
    (whole,) = calls(kernel, end, 1)
    assert whole[:6] == (30, 20, 10, 5, 99, (4, 1, 512))
    gathered, enter, leave, *args = whole[6:]
    assert gathered is not None and enter is not None and leave is not None
    first, *others = calls(straight(kernel), end, 3)
    assert first[6] is not None
    # Constants do not count: Triton compiled them in.
    assert args[:1] + args[2:4] == [PASSED[0], PASSED[2], 7]
    real = [PASSED[0].data_ptr(), None, PASSED[2].data_ptr(), 7, None, None]
    assert others == [(30, 20, 10, 5, 99, (4, 1, 512), None, None, None, *real)] * 2


def test_watched_calls_take_the_whole_way(dependent: tuple[Any, Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    kernel, end = dependent
    assert [call[6] is None for call in calls(straight(kernel), end, 2)] == [False, True]
    seen: list[Any] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        assert [call[6] is None for call in calls(kernel, end, 1)] == [False]
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    monkeypatch.setattr(profiler, "_is_profiler_enabled", True)
    monkeypatch.setattr(kernel, "get_profiler_kwargs", lambda *args: {}, raising=False)
    assert [call[6] is None for call in calls(kernel, end, 1)] == [False]
    monkeypatch.setattr(profiler, "_is_profiler_enabled", False)
    assert [call[6] is None for call in calls(kernel, end, 1)] == [True]


@pytest.mark.parametrize("setting", ["dump_launch_params", "dump_launch_tensors", "triton_interpret"])
def test_what_is_dumped_or_interpreted_is_left_to_inductor(static: tuple[Any, Recorder], setting: str) -> None:
    kernel, _ = static
    setattr(straight(kernel), setting, True)
    assert kernel._short_way() is None


def test_an_unknown_version_is_left_to_inductor(static: tuple[Any, Recorder]) -> None:
    kernel, end = static
    del kernel.launchers[0].__globals__["runner"].__self__.full_constexprs
    assert straight(kernel)._short_way() is None
    assert len(calls(kernel, end, 2)) == 2


def test_parameters_that_hide_what_is_called_are_left_to_inductor(dependent: tuple[Any, Recorder]) -> None:
    kernel, end = dependent
    kernel.launchers[0].__code__ = (lambda x, whole, _grid_0, _grid_1, _grid_2, stream: None).__code__
    assert straight(kernel)._short_way() is None


def test_futures_of_kernels_and_other_objects(static: tuple[Any, Recorder]) -> None:
    kernel, _ = static
    future: Future[Any] = Future()
    future.set_result(kernel)
    assert straight(future).result() is kernel and type(kernel) is StraightAutotuner
    other = object()
    assert straight(other) is other


def test_a_kernel_is_pickled_without_its_short_way(static: tuple[Any, Recorder]) -> None:
    kernel, _ = static
    straight(kernel).run = lambda *args, **named: None
    kernel.launchers, kernel.compile_results = [], []
    again = pickle.loads(pickle.dumps(kernel))
    assert type(again) is StraightAutotuner and "run" not in again.__dict__


def test_a_wrapper_without_this_package_defines_inductors_object() -> None:
    from fusion_passes.lowering import STRAIGHT

    scope: dict[str, Any] = {}
    with mock.patch.dict("sys.modules", {"fusion_passes.launching": None}):
        exec(STRAIGHT, scope)
    assert scope["straight"](scope) is scope
    exec(STRAIGHT, scope)
    assert scope["straight"] is launching.straight
