"""How a compiled graph launches the kernels of this package: by the shortest way to the binary.

Inductor's object for a kernel looks at every call for tuning, dumps and debuggers. A dependent launch goes through
Triton's launcher besides, for which it gathers what a profiler's hooks would want to know, whether there are hooks or
not. All that takes the host longer than the launch. After the first call the way is known: the wrapper of a compiled
graph calls a function that was written for this kernel, which hands the arguments to the binary. While a profiler, a
hook or a debugger watches, calls take the whole way again.

torch 2.13 has such a function for launches that are not dependent; it keeps it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch._inductor.codecache import CodeCacheFuture
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.autograd import profiler
from torch.utils._debug_mode import get_active_debug_mode

log = logging.getLogger(__name__)


def straight(kernel: Any) -> Any:
    """What a generated wrapper defines a kernel as: Inductor's object or the future of one, that learns the short way.

    Anything else, such as the object of a benchmark of bandwidths, is returned as it is.
    """
    if isinstance(kernel, (Future, CodeCacheFuture)):
        return _StraightFuture(kernel)
    # Not a subclass: those launch in ways of their own.
    if type(kernel) is CachingAutotuner:
        kernel.__class__ = StraightAutotuner
    return kernel


class _StraightFuture(CodeCacheFuture):
    """The future of a kernel that another process compiles."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def result(self, *timeout: Any, **named: Any) -> Any:
        return straight(self.kernel.result(*timeout, **named))


class StraightAutotuner(CachingAutotuner):
    """Inductor's object for a kernel, whose `run` is replaced after its first call."""

    def run(self, *args: Any, stream: Any, **named: Any) -> Any:
        result = super().run(*args, stream=stream, **named)
        if not named:
            self.run = self._short_way() or super().run  # type: ignore[method-assign]
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "run"}

    def _short_way(self) -> Callable[..., None] | None:
        """The function that takes the place of `run`, or None where calls have to go the whole way."""
        try:
            if torch.version.hip is not None or self.triton_interpret or len(self.launchers) != 1:
                return None
            if self.launchers[0].store_cubin or self.dump_launch_params or self.dump_launch_tensors:
                return None
            if not getattr(self.launchers[0], "_is_static", False):
                return self._dependent()
            return None if hasattr(CachingAutotuner, "_build_fast_launcher") else self._static()
        except Exception:  # private interfaces, of which another version may have others
            log.debug("%s is launched as Inductor does", self.fn.__name__, exc_info=True)
            return None

    def _static(self) -> Callable[..., None]:
        """Straight to the driver: `StaticallyLaunchedCudaKernel.run` without its preparations."""
        kernel = self.launchers[0].__globals__["runner"].__self__
        used = [name for place, name in enumerate(kernel.arg_names) if place not in kernel.full_constexprs]
        scratch = ["None"] * (kernel.has_global_scratch + kernel.has_profile_scratch)
        scope = {
            "launch": kernel.C_impl._launch_kernel,
            "function": kernel.function,
            "warps": kernel.num_warps,
            "shared": kernel.shared,
            "types": kernel.arg_tys + "O" * len(scratch),
        }
        assert len(used) == len(kernel.arg_tys) and kernel.function is not None
        passed = ", ".join((*used, *scratch))
        return self._written(f"launch(function, {{grid}}, warps, shared, types, ({passed},), stream)", scope)

    def _dependent(self) -> Callable[..., None]:
        """Triton's launcher without the data for hooks that are not there, and with addresses.

        It asks the driver whether it can reach a tensor that it is given; a compiled graph has those of its GPU alone.
        """
        from triton import knobs

        (result,), made = self.compile_results, self.launchers[0].__globals__
        fn, types = result.kernel.src.fn, result.kernel.src.signature

        def passed(name: str) -> str:
            # Constants are taken as well, and are not looked at.
            return "None" if types[name] == "constexpr" else f"{name}.data_ptr()" if types[name][0] == "*" else name

        scope = {name: made[name] for name in ("runner", "function", "metadata")}
        scope |= {"entering": knobs.runtime.launch_enter_hook.calls, "leaving": knobs.runtime.launch_exit_hook.calls}
        call = f"runner({{grid}}, stream, function, metadata, None, None, None, {', '.join(map(passed, fn.arg_names))})"
        return self._written(call, scope, watching=" or entering or leaving")

    def _written(self, call: str, scope: dict[str, Any], watching: str = "") -> Callable[..., None]:
        """A function that takes what the wrapper passes and makes the call, or `run`'s own where somebody watches."""
        code = self.launchers[0].__code__
        *names, stream = code.co_varnames[: code.co_argcount]
        assert stream == "stream" and names[-3:] == ["_grid_0", "_grid_1", "_grid_2"], names
        scope |= {"profiler": profiler, "debugged": get_active_debug_mode, "whole": super().run}
        assert scope.keys().isdisjoint(names), f"a parameter of the kernel is called like one of {list(scope)}"
        args = ", ".join(names)
        lines = (
            f"def run({args}, *, stream):",
            f"    if profiler._is_profiler_enabled or debugged(){watching}:",
            f"        return whole({args}, stream=stream)",
            f"    {call.format(grid=', '.join(names[-3:]))}",
        )
        exec("\n".join(lines), scope)
        return scope["run"]
