"""What is known of subgraphs that were put to a proof, so that the layers of a model cost one proof."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Generic, TypeVar

from fusion_passes.fusion import NearMiss

T = TypeVar("T")

REMEMBERED = 64


class Proofs(Generic[T]):
    """Results of a proof by the fingerprints of what was proved, failures included; the latest are kept."""

    def __init__(self) -> None:
        self._known: collections.OrderedDict[str, T | NearMiss] = collections.OrderedDict()

    def of(self, key: str, prove: Callable[[], T]) -> T:
        """What `prove` returns or returned for `key`.

        Raises:
            NearMiss: as raised by `prove`, now or then. Other errors are raised and not remembered.
        """
        if key not in self._known:
            try:
                self._known[key] = prove()
            except NearMiss as miss:
                self._known[key] = NearMiss(miss.args[0])
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        known = self._known[key]
        if isinstance(known, NearMiss):
            raise NearMiss(known.args[0])
        return known

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()
