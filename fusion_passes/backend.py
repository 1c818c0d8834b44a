"""The doors: the `fusion_passes` backend, `options()` and `enabled()`.

All three do the same: they put a `FusionPass` behind whatever already sits in Inductor's
`post_grad_custom_pre_pass`. Ops are imported here, with the package, because a graph from a warm cache calls
them in a process in which no pass ever ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch._inductor import config as inductor_config
from torch.fx import GraphModule

from fusion_passes import (
    expectation,
    ops,  # noqa: F401  (registers the ops)
    records,
)
from fusion_passes.graph_pass import FusionPass, compose, members
from fusion_passes.settings import named, snapshot, split_options

log = logging.getLogger(__name__)

SLOT = "post_grad_custom_pre_pass"


def _launch_statically() -> None:
    """Have kernels like ours launched from C++, as Inductor's own are: about 4 us less per call.

    The launchers are made in Inductor's worker processes, which see the environment and not the configuration, so this
    has to come before they start. TORCHINDUCTOR_STATIC_LAUNCH_USER_DEFINED_TRITON_KERNELS=0 keeps it off.
    """
    name = "static_launch_user_defined_triton_kernels"
    variable = f"TORCHINDUCTOR_{name.upper()}"
    if hasattr(inductor_config, name) and variable not in os.environ:
        os.environ[variable] = "1"
        setattr(inductor_config, name, True)


_launch_statically()


def fusion_passes_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph with Inductor and the fusion pass; the backend behind `backend="fusion_passes"`.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: any mode of Inductor ("default", "reduce-overhead", "max-autotune", ...).
        options: any of Inductor's options, and `fusion_passes.<setting>` for the settings of this package. What
            `fusion_passes.options()` returned may be among them; its settings hold where no such key is given.

    Raises:
        ValueError: an unknown `fusion_passes.*` option or fusion name; the message lists the valid ones.
        TypeError: a setting has the wrong type.
        ExpectationError: another number of sites was fused than the setting `expect` says.
        RuntimeError: an option that Inductor does not know.
    """
    from torch._inductor.compile_fx import compile_fx

    own, inductor_options = split_options(options)
    patches = dict(torch._TorchCompileInductorWrapper(mode, inductor_options, None).config)
    settings = snapshot({**_settings_of(inductor_options.get(SLOT)), **own})
    if settings.enabled is False:
        return cast(Any, compile_fx(gm, example_inputs, config_patches=patches))
    _warn_if_out_of_process()
    slot = patches.get(SLOT, getattr(inductor_config, SLOT))
    ours = FusionPass(settings)
    patches[SLOT] = compose(slot, ours)
    before = Counter(records.recall())
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    if ours.fusions:
        # The pass says so itself where it runs; on a warm cache it does not run.
        found = list((Counter(records.recall()) - before).elements())
        if not ours.ran:
            records.trace(found)
        expectation.warn_if_nothing(found)
    return compiled


def _settings_of(slot: Any) -> dict[str, Any]:
    """The settings of our own pass, if the slot holds one."""
    ours = [member.settings for member in members(slot) if isinstance(member, FusionPass)]
    return dataclasses.asdict(ours[-1]) if ours else {}


def _reset() -> None:
    # What `torch._dynamo.reset()` does for the stock backend: CUDA graphs of dropped code are freed.
    from torch._inductor import config

    if config.triton.cudagraph_trees and torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


fusion_passes_backend.reset = _reset  # type: ignore[attr-defined]


def options(**own: Any) -> dict[str, Any]:
    """Options that give a plain Inductor compile the fusion pass, to merge into `options=`.

    Keyword arguments are settings by their short names: `options(fusions="default,-gate_cumsum", strict=True)`.
    Passes that Inductor's configuration holds at the time of the call are kept.

    Raises:
        ValueError: an unknown setting or fusion name.
        TypeError: a setting has the wrong type.
    """
    settings = named(**own)
    slot = getattr(inductor_config, SLOT)
    if settings.enabled is False:
        return {SLOT: slot} if slot is not None else {}
    _warn_if_out_of_process()
    return {SLOT: compose(slot, FusionPass(settings))}


@contextlib.contextmanager
def enabled(**own: Any) -> Iterator[None]:
    """Give every Inductor compile that happens inside the block the fusion pass.

    For frameworks that insist on `backend="inductor"`. `torch.compile` compiles at the first call, so that call
    has to be inside the block. Keyword arguments are settings, as for `options`.
    """
    with inductor_config.patch(options(**own)):
        yield


def install() -> None:
    """Put the pass into Inductor's configuration for good, as the setting `enabled=True` asks on import."""
    setattr(inductor_config, SLOT, options()[SLOT])


_warned = False


def _warn_if_out_of_process() -> None:
    """Say once that Inductor's subprocess compile mode, which never pickles custom passes, drops ours."""
    global _warned
    from torch._inductor import compile_fx

    mode = getattr(getattr(compile_fx, "fx_compile_mode", None), "name", "NORMAL")
    if mode == "SUBPROCESS" and not _warned:
        _warned = True
        log.warning(
            "TORCHINDUCTOR_FX_COMPILE_MODE=SUBPROCESS compiles in another process, to which torch does not hand "
            "custom passes: nothing will be fused. Unset it to use fusion_passes."
        )
