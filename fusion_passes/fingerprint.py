"""What the compile caches must know about us.

Inductor's caches key a compiled graph by the `uuid()` of every custom pass, and look neither into its source nor
into the kernels and lowerings that it brings. The fingerprint therefore covers all of it: every source and data
file of this package (the symlinked `ops` and `patterns` included), the packages of fusions that others registered
(the folder of the fusion and all below), the settings, and the versions of torch and triton.

Sources are read once, when this module is first imported together with the code they describe: a file that is
edited later in the life of the process does not change the code that runs, and must not change the key.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fusion_passes.fusion import Fusion
from fusion_passes.settings import Settings

_SUFFIXES = (".py", ".json")


def source_files(root: Path) -> Iterator[Path]:
    """Every source and data file below `root`, symlinked folders included, in a fixed order."""
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if f != "__pycache__")
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(_SUFFIXES))


def hash_files(root: Path) -> str:
    """One digest of the names and contents of all source files below `root`."""
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


SOURCES = hash_files(Path(__file__).parent)


def fingerprint(settings: Settings, fusions: Iterable[Fusion]) -> str:
    """The cache key of a pass with these settings and fusions, as a hexadecimal digest."""
    parts = [SOURCES, repr(settings), torch.__version__, _triton_version()]
    parts += [f"{fusion.name}:{_module_hash(fusion)}" for fusion in fusions]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


_hashes: dict[str, str] = {}


def _module_hash(fusion: Fusion) -> str:
    """Digest of the code of a fusion that another package brings; empty for our own, which SOURCES covers."""
    return " ".join(_code_hash(f) for f in (fusion.match, *fusion.sources))


def _code_hash(function: Callable[..., Any]) -> str:
    """Digest of the file of a function and, if that is part of a package, of all files in its folder and below."""
    if function.__module__.startswith("fusion_passes."):
        return ""
    path = inspect.getsourcefile(inspect.unwrap(function))
    if path is None or not os.path.exists(path):
        # Code without a file cannot be told apart from its next edit: never share its graphs.
        return os.urandom(16).hex()
    folder = Path(path).parent
    if (folder / "__init__.py").exists():  # the op and its kernel are there
        return _hashes.get(str(folder)) or _hashes.setdefault(str(folder), hash_files(folder))
    return _hashes.get(path) or _hashes.setdefault(path, hashlib.sha256(Path(path).read_bytes()).hexdigest())


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "no triton"
    return str(triton.__version__)
