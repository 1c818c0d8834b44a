"""`apply`: the fused ops in a program of `torch.export`, without `torch.compile`."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram

from fusion_passes.graph_pass import FusionPass
from fusion_passes.settings import named


def apply(program: ExportedProgram, **own: Any) -> ExportedProgram:
    """The program with its sites replaced by calls of `torch.ops.fusion_passes.*`; the given one is left as it is.

    The graph is decomposed as Inductor does it first, so it consists of functional ATen operators and fused ops. It can
    be run, saved and loaded, where the process that loads it imports `fusion_passes.ops`. AOTInductor needs no `apply`:
    hand `fusion_passes.options()` to it as `inductor_configs`, and the kernels become a part of the package.

    Args:
        program: what `torch.export.export` returned, with static or dynamic shapes. Export a model for inference, under
            `torch.no_grad()`, on the device on which it shall run.
        own: settings by their short names, as for `fusion_passes.options`.

    Raises:
        TypeError: `program` is no `ExportedProgram`, or a setting has the wrong type.
        ValueError: an unknown setting or fusion name.
        ExpectationError: another number of sites was fused than the setting `expect` says.
    """
    from torch._inductor.decomposition import select_decomp_table

    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program must be an ExportedProgram of torch.export.export, got {type(program).__name__}")
    settings = named(**own)
    if settings.enabled is False:
        return program
    decomposed = program.run_decompositions(select_decomp_table())
    module = decomposed.graph_module
    # The program's signature names the nodes that are its results.
    with module._set_replace_hook(decomposed.graph_signature.get_replace_hook()):
        FusionPass(settings)(module.graph)
    module.recompile()
    decomposed.validate()
    return decomposed
