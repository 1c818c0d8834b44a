"""What the scripts that sweep launch parameters share: stock Inductor as a peer, and failures that are results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def stock(plain: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The spelling of a model, compiled by stock Inductor with its `options`."""
    return torch.compile(lambda *args: plain(*args), dynamic=False, options=options or None)


def stock_peers(plain: Callable[..., Any]) -> dict[str, Callable[[], Callable[..., Any]]]:
    """What makes stock peers of an op, by name: plain, and with combo kernels."""
    return {"stock": functools.partial(stock, plain), "combo": functools.partial(stock, plain, combo_kernels=True)}


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `call` returns, or how it failed; a failure takes forever."""
    try:
        return call()
    except Exception as failure:
        return {"us": float("inf"), "failed": f"{type(failure).__name__}: {failure}"[:200]}
