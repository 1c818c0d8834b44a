"""What the launch choice has to know about a GPU: its limits and its measured copy rate.

The values come from `torch.cuda` where the GPU is there, and from a table where code is only generated, explained
or compiled for a GPU that is not. Limits are per thread block, in bytes, registers (32 bit) and threads.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One kind of GPU.

    Attributes:
        name: "sm_90" or "gfx942": the key of the tuned tables.
        gpu: a GPU of this kind, in the vendor's words.
        multiprocessors: streaming multiprocessors or compute units.
        shared_memory: bytes of shared memory that one block may use.
        registers: 32-bit registers of one multiprocessor.
        max_threads: threads of one block.
        warp_size: threads of one warp or wavefront.
        copy_rate: bytes read plus written per second by a large copy.
        matmul_rate: bf16 matrix product with float32 sums, in FLOP/s.
        fp8: tensor cores take float8 operands.
        pdl: programmatic dependent launch exists.
    """

    name: str
    gpu: str
    multiprocessors: int
    shared_memory: int
    registers: int
    max_threads: int
    warp_size: int
    copy_rate: float
    matmul_rate: float
    fp8: bool
    pdl: bool


# sm_90 rates were measured on an H200; the others are 88 % of the memory rate and 79 % of the matrix rate that the
# vendors publish for A100 80GB, L40S, B200 and MI300X, the shares that the H200 reaches.
TABLE = {
    "sm_80": Architecture(
        "sm_80", "NVIDIA A100", 108, 166_912, 65_536, 1024, 32, 1.79e12, 2.46e14, fp8=False, pdl=False
    ),
    "sm_89": Architecture("sm_89", "NVIDIA L40S", 142, 101_376, 65_536, 1024, 32, 7.6e11, 2.86e14, fp8=True, pdl=False),
    "sm_90": Architecture("sm_90", "NVIDIA H200", 132, 232_448, 65_536, 1024, 32, 4.25e12, 7.86e14, fp8=True, pdl=True),
    "sm_100": Architecture(
        "sm_100", "NVIDIA B200", 148, 232_448, 65_536, 1024, 32, 7.04e12, 1.78e15, fp8=True, pdl=True
    ),
    "gfx942": Architecture(
        "gfx942", "AMD MI300X", 304, 65_536, 131_072, 1024, 64, 4.66e12, 1.03e15, fp8=True, pdl=False
    ),
}


def by_name(name: str) -> Architecture:
    """The table's entry for `name`.

    Raises:
        ValueError: no such entry; the message lists the valid names.
    """
    if name not in TABLE:
        raise ValueError(f"unknown architecture {name!r}: it must be one of {', '.join(sorted(TABLE))}")
    return TABLE[name]


def of_device(device: torch.device) -> Architecture:
    """The GPU behind a CUDA (or ROCm) device; its limits as the driver reports them."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _of_index(index)


@functools.cache
def _of_index(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    gcn = str(getattr(properties, "gcnArchName", "")).split(":")[0]
    major, minor = getattr(properties, "major", 0), getattr(properties, "minor", 0)
    name = gcn if gcn.startswith("gfx") else f"sm_{major}{minor}"
    nearest = TABLE.get(name) or _nearest(gcn, major)
    return dataclasses.replace(
        nearest,
        name=name,
        multiprocessors=getattr(properties, "multi_processor_count", nearest.multiprocessors),
        shared_memory=getattr(properties, "shared_memory_per_block_optin", nearest.shared_memory),
        warp_size=getattr(properties, "warp_size", nearest.warp_size),
        max_threads=getattr(properties, "max_threads_per_block", nearest.max_threads),
    )


def _nearest(gcn: str, major: int) -> Architecture:
    """The entry whose rates stand in for a GPU that the table does not have."""
    if gcn.startswith("gfx"):
        return TABLE["gfx942"]
    return TABLE["sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"]
