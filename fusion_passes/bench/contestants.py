"""What is timed on a case: the fused compile, the bare op, stock Inductor in three modes, eager, and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fusion_passes.backend import fusion_passes_backend
from fusion_passes.bench.cases import require
from fusion_passes.benchmarking import Call, Case

# Arguments of torch.compile for the spellings that are compiled by stock Inductor.
STOCK: dict[str, dict[str, Any]] = {
    "stock": {},
    "combo_kernels": {"options": {"combo_kernels": True}},
    "max_autotune": {"mode": "max-autotune-no-cudagraphs"},
}
BASELINES = (*STOCK, "eager")


def known_baselines(cases: Sequence[Case]) -> list[str]:
    """Everything that can be put beside us on these cases: the built-in baselines, and the peers' names."""
    return [*BASELINES, *dict.fromkeys(name for case in cases for name in case.peers)]


def parse_baselines(text: str | None, known: Sequence[str], kind: str = "baseline") -> list[str]:
    """The names in a comma-separated list; all that are known for None. An error calls them by their kind.

    Raises:
        ValueError: a name is not known; the message lists those that are.
    """
    if text is None:
        return list(known)
    names = [word.strip() for word in text.split(",") if word.strip()]
    for name in names:
        require(name, known, kind)
    return names


def ours(device: torch.device) -> dict[str, Any]:
    """Arguments of torch.compile for our backend; on a CPU the fused ops run their references."""
    options = {"fusion_passes.reference_on_cpu": True} if device.type == "cpu" else {}
    return {"backend": fusion_passes_backend, **({"options": options} if options else {})}


def contestants(case: Case, baselines: Sequence[str], device: torch.device) -> tuple[dict[str, Call], dict[str, str]]:
    """The callables to time, ours first, and the peers that are not there with the reason.

    Every compiled callable has a code object of its own, so that all of them stay compiled at the same time.
    """
    found: dict[str, Call] = {}
    missing: dict[str, str] = {}
    if case.plain is not None:
        found["fused"] = _compiled("fused", case.plain, ours(device))
    found["op"] = case.op
    for name in baselines:
        if name in STOCK and case.plain is not None:
            found[name] = _compiled(name, case.plain, STOCK[name])
        elif name == "eager" and case.plain is not None:
            found[name] = case.plain
        elif name in case.peers:
            try:
                found[name] = case.peers[name]()
            except ImportError as error:
                missing[name] = f"not installed: {error}"
    return found, missing


def _compiled(name: str, plain: Call, arguments: Mapping[str, Any]) -> Call:
    def call(*args: Any) -> Any:
        return plain(*args)

    # Dynamo keeps compiled code by code object, and this one is the same for every function made here.
    call.__code__ = call.__code__.replace(co_name=name)
    # A graph break would be timed as several graphs.
    compiled: Callable[..., Any] = torch.compile(call, dynamic=False, fullgraph=True, **arguments)
    return compiled
