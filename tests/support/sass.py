"""Compiles a kernel for a GPU that is not there, and reads registers, spills and memory widths off the binary."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fusion_passes.arch import TABLE
from fusion_passes.lowering import Launch, Operand, Output

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.bool: "*i1",
}


@dataclasses.dataclass(frozen=True)
class Binary:
    """What a compiled kernel uses. `instructions` counts opcodes with their suffixes, such as STG.E.128 (NVIDIA)."""

    registers: int
    spilled: int
    shared: int
    instructions: Counter[str]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def compile_launch(launch: Launch, arch: str, folder: Path) -> Binary:
    """Compile a launch as Triton's own launcher would specialise it, pointers aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned = {}, {}, []
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        tensor = isinstance(value, (Operand, Output))
        signature[name] = _POINTERS[value.dtype] if tensor else "i32" if value < 2**31 else "i64"
        if tensor or (specialised and value % 16 == 0):
            aligned.append(index)
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    warp = TABLE[arch].warp_size
    target = GPUTarget("hip", arch, warp) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), warp)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        return _amd(compiled)
    return _nvidia(compiled, Path(triton.__file__).parent / "backends" / "nvidia" / "bin", folder)


def _nvidia(compiled: Any, tools: Path, folder: Path) -> Binary:
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, _, local = map(int, found.groups())
    text = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", text)
    return Binary(registers, stack + local, compiled.metadata.shared, Counter(opcodes))


def _amd(compiled: Any) -> Binary:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        assert found is not None, f"{key} is not in the assembly"
        return int(found.group(1))

    opcodes = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)\s", text, re.M)
    return Binary(number("vgpr_count"), number("vgpr_spill_count"), compiled.metadata.shared, Counter(opcodes))
