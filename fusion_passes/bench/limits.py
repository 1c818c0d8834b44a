"""A limit on the time that a block of code may take."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class _Expired(BaseException):
    """No `Exception`: whoever catches those, as compilers do, would go on."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise a `TimeoutError` if the block takes longer. For the main thread; None is no limit.

    The block is stopped between two steps of Python: a long call into C is waited for.
    """
    if seconds is None:
        yield
        return

    def expire(*unused: Any) -> None:
        raise _Expired

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Expired:
        raise TimeoutError(f"takes longer than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
