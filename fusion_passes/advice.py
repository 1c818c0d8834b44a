"""What would make a site match, in words: the hints that several fusions give.

A hint is for the author of the model or the caller, and names what to change, with the numbers that the kernel has.
Where a subgraph simply computes something else there is nothing to say, and no hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusion_passes.fusion import Because, dtype_name

# Where sizes are symbolic that should be numbers.
STATIC = "keep sizes numbers: dynamic=False and no mark_dynamic, or torch._dynamo.mark_static for what never changes"

# Where something is returned or saved for the backward pass.
KEPT = "do not return it, and call the model under torch.no_grad() if no gradient is needed"

# Where an unrolled loop over chunks is too long, or its length is not known.
LOOP = "bind a Hugging Face model, which replaces the loop: fusion_passes.transformers.bind"


def symbolic(what: str) -> Because:
    """The reason and the hint where something that the kernel has compiled in is a symbolic size."""
    return Because(f"its number of {what} is symbolic; the kernel is compiled for a fixed number", STATIC)


def listed(values: Sequence[Any]) -> str:
    """Values as in a sentence: "16, 32 or 64"; dtypes by their names."""
    *most, last = [dtype_name(v) if isinstance(v, torch.dtype) else str(v) for v in values]
    return f"{', '.join(most)} or {last}" if most else last


def stored(name: str, dtypes: Sequence[torch.dtype]) -> str:
    """Where a tensor has a dtype that the kernel does not read; there are better ones to cast to than float8."""
    good = [d for d in dtypes if d.is_floating_point and d.itemsize > 1] or dtypes
    return f"hand {name} over in {listed(good)}: a cast inside of what is compiled may be looked through"


def adjacent(name: str, what: str = "columns") -> str:
    """Where the kernel needs the elements of the last axis next to each other."""
    return f"lay out {name} with neighbouring {what} next to each other in memory, by .contiguous() before the call"


def padded(names: str, width: int, fits: Sequence[int], what: str = "channels") -> str:
    """Where a width has no kernel: the next one that has, or "" where none is wide enough."""
    wide = min((fit for fit in fits if fit >= width), default=None)
    return f"pad {names} with zeros to {wide} {what}" if wide is not None else ""
