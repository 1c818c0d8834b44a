"""Every spelling of the gate and its chunk cumsum, every look-alike, and those that may go either way.

Each table maps a name to an `Entry`: the function, a factory of example inputs, the case it means (or resembles)
and, for look-alikes, how it differs. The functions were written without looking at the matcher.
"""

from __future__ import annotations

from tests.patterns.gate_cumsum_cases import Entry, Table
from tests.patterns.gate_cumsum_channel import CHANNEL
from tests.patterns.gate_cumsum_either import EITHER
from tests.patterns.gate_cumsum_head import BOUNDED, HEAD
from tests.patterns.gate_cumsum_lookalikes import LOOKALIKES as OTHERS
from tests.patterns.gate_cumsum_products import OTHER_PRODUCTS, PRODUCTS

SPELLINGS: Table = {**CHANNEL, **HEAD, **BOUNDED, **PRODUCTS}
LOOKALIKES: Table = {**OTHERS, **OTHER_PRODUCTS}

__all__ = ["EITHER", "LOOKALIKES", "SPELLINGS", "Entry"]
