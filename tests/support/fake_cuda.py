"""Inductor's CUDA code generation on a machine without a GPU.

Tensors are fake CUDA tensors, device properties and Triton's driver are stand-ins, and the compile stops as soon as
the wrapper's source exists. Uses private interfaces of torch 2.13: tests that need it call `require()` first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


def require() -> None:
    """Skip the calling test where this module does not know the torch at hand."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("code generation without a GPU is written for torch 2.13 and newer")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: tests/gpu runs the real thing")


@dataclasses.dataclass(frozen=True)
class Properties:
    """`torch.cuda.get_device_properties` of an H200."""

    major: int = 9
    minor: int = 0
    name: str = "NVIDIA H200"
    multi_processor_count: int = 132
    total_memory: int = 140 << 30
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 232448
    shared_memory_per_multiprocessor: int = 233472
    L2_cache_size: int = 60 << 20
    is_integrated: bool = False
    gcnArchName: str = ""


class _Driver:
    """Triton's active driver, for the parts of the compiler that ask for the target."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return 9, 0

    def get_current_stream(self, *_: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    # The autotuner that carries warps and stages asks for a benchmarker when it is made and never calls it.
    def get_benchmarker(self) -> Callable[..., Any]:
        return lambda *args, **kwargs: 0.0


class _Captured(Exception):
    def __init__(self, code: str) -> None:
        super().__init__("captured")
        self.code = code


def _clear_caches() -> None:
    import torch.utils._triton as triton_utils
    from torch._inductor.runtime import hints

    names = ("has_triton", "triton_backend", "triton_hash_with_backend")
    for function in (hints.DeviceProperties.create, *(getattr(triton_utils, name, None) for name in names)):
        for candidate in (function, getattr(function, "__func__", None)):
            clear = getattr(candidate, "cache_clear", None)
            if clear is not None:
                clear()


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """A process that believes in one H200."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph, post_grad
    from triton.runtime import driver

    properties = Properties()
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
        "get_device_capability": (9, 0), "synchronize": None, "is_bf16_supported": True, "_exchange_device": 0,
        "_maybe_exchange_device": 0, "current_stream": mock.Mock(stream_id=0, cuda_stream=0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip

    def patch(owner: Any, name: str, value: Any) -> None:
        stack.enter_context(mock.patch.object(owner, name, value))

    def answer(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    def sliced(original: Callable[..., Any]) -> Callable[..., Any]:
        # Python's indexing looks for a CUDA runtime, the operator behind it does not: `pad_mm` slices its products.
        def getitem(self: torch.Tensor, index: Any) -> torch.Tensor:
            plain = isinstance(index, tuple) and all(isinstance(part, slice) for part in index)
            if not plain or not self.is_cuda:
                return original(self, index)
            for axis, part in enumerate(index):
                if part != slice(None):
                    self = torch.ops.aten.slice.Tensor(self, axis, part.start or 0, part.stop, part.step or 1)
            return self

        return getitem

    def cpu_tables(original: Callable[..., Any]) -> Callable[..., Any]:
        # Pattern tables are traced on real tensors: let them see no GPU.
        def init(*devices: Any, **kwargs: Any) -> Any:
            with mock.patch.object(torch.cuda, "is_available", answer(False)):
                return original(*(torch.device("cpu") for _ in devices), **kwargs)

        return init

    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            patch(torch.cuda, name, answer(value))
        patch(torch.version, "cuda", "13.0")
        patch(torch.Tensor, "__getitem__", sliced(torch.Tensor.__getitem__))
        for module in (joint_graph, post_grad):
            patch(module, "lazy_init", cpu_tables(module.lazy_init))
        for name in ("device_count", "current_device", "get_device_properties", "synchronize", "is_bf16_supported"):
            patch(CudaInterface, name, staticmethod(answer(answers[name])))
        patch(CudaInterface, "get_raw_stream", staticmethod(answer(0)))
        patch(CudaInterface.Worker, "get_device_properties", staticmethod(answer(properties)))
        patch(CudaInterface.Worker, "current_device", staticmethod(answer(0)))
        _clear_caches()
        previous = driver._active
        driver.set_active(_Driver())
        try:
            yield
        finally:
            driver._active = previous
            _clear_caches()


def _find(error: BaseException | None) -> _Captured | None:
    while error is not None and not isinstance(error, _Captured):
        error = error.__cause__ or error.__context__
    return error


def wrapper_code(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    dynamic: Sequence[int] = (),
    options: dict[str, Any] | None = None,
) -> str:
    """The wrapper that Inductor writes for `function` on CUDA copies of the CPU tensors `args`.

    Args:
        function: traced to ATen on the CPU tensors.
        args: tensors or numbers.
        dynamic: positions of the tensors whose second axis (tokens) is symbolic.
        options: Inductor options.
    """
    from torch._dynamo.source import ConstantSource
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch.fx.experimental.proxy_tensor import make_fx

    def capture(self: Any) -> Any:
        code = self.codegen()[0]
        raise _Captured(getattr(code, "value", code))

    with fake_cuda():
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        names = itertools.count()

        def on_cpu(index: int, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            axes = [DimDynamic.STATIC] * value.dim()
            if index in dynamic:
                axes[1] = DimDynamic.DYNAMIC
            context: Any = StatelessSymbolicContext(axes)
            return mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"arg{next(names)}"))

        def on_cuda(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")

        # Tracing binds Python methods, which would look for a CUDA runtime: trace on the CPU, compile for CUDA.
        inputs = [on_cpu(i, value) for i, value in enumerate(args)]
        with mode:
            graph = make_fx(function)(*inputs)
            for node in graph.graph.nodes:
                if "device" in node.kwargs:  # tensors that the function makes
                    node.update_kwarg("device", torch.device("cuda", 0))
            fakes = [on_cuda(value) for value in inputs]
        tracing = torch._guards.TracingContext(mode)
        settings = {"force_disable_caches": True, "compile_threads": 1, **(options or {})}
        with mock.patch.object(GraphLowering, "_compile_to_module", capture), torch._guards.tracing(tracing):
            try:
                compile_fx(graph, fakes, config_patches=settings)
            except Exception as error:
                found = _find(error)
                if found is None:
                    raise
                return found.code
    raise AssertionError("Inductor compiled the graph without generating a wrapper")


def written_arguments(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A list that gets, for each kernel launched in code generated from now on, the arguments that count as written.

    Where Triton's analysis fails, Inductor takes every input for written, and copies what is needed later.
    """
    from torch._inductor import ir

    written: list[list[str]] = []
    construct = ir.UserDefinedTritonKernel.__init__

    def spy(self: ir.UserDefinedTritonKernel, **kwargs: Any) -> None:
        construct(self, **kwargs)
        tensors = ((name, v) for name, v in kwargs["kernel_args"].items() if isinstance(v, ir.TensorBox))
        names: dict[str, str] = {value.get_name(): name for name, value in tensors}
        written.append(sorted(names[argument.get_name()] for argument in self.mutable_args))

    monkeypatch.setattr(ir.UserDefinedTritonKernel, "__init__", spy)
    return written


def body(code: str) -> list[str]:
    """The statements of the `call` of a wrapper."""
    return [line.strip() for line in code[code.index("def call(") :].splitlines()]


def launches(code: str, kernel: str = "") -> list[str]:
    """The statements of a wrapper that launch a Triton kernel whose name begins with `kernel`."""
    return [line for line in body(code) if re.match(rf"{kernel}\w*\.run\(", line)]


def allocated(code: str) -> list[str]:
    """The statements of a wrapper that allocate memory."""
    return [line for line in body(code) if "= empty_strided_cuda(" in line]
