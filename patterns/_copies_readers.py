"""Who reads the versions of a graph input, and whether each would still see its version if the writes were in place."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Node

from fusion_passes.fusion import Refusal
from fusion_passes.patterns._copies_aliases import is_dead, is_mutation, may_be_view, roots, uses
from fusion_passes.patterns._copies_values import Value, Write, is_write
from fusion_passes.patterns._copies_windows import Window, disjoint
from fusion_passes.views import is_alias, is_view

aten = torch.ops.aten


class _Late(Exception):
    """`reader` has to be computed before `write`, and stands behind it."""

    def __init__(self, reader: Node, write: Write, reason: str) -> None:
        super().__init__(reason)
        self.reader, self.write = reader, write


class Readers:
    """The readers of all versions, with the places in the graph where they read.

    Attributes:
        buffered: writes whose sources overlap what they overwrite.
        returned: versions that the graph returns.
        earlier: for a write, the nodes behind it that are to be computed before it, in their order.
    """

    def __init__(
        self,
        cache: Node,
        writes: Sequence[Write],
        versions: dict[Node, Value],
        epilogue: Node | None,
        ignored: Collection[Node] = (),
    ) -> None:
        self.cache, self.writes, self.versions = cache, writes, versions
        # The epilogue and what the writes in place do without read nothing.
        self.epilogue, self.ignored = epilogue, {epilogue, *ignored}
        self.buffered: set[Write] = set()
        self.returned: list[Node] = []
        self.earlier: dict[Write, list[Node]] = {}
        # Nodes that are to be moved before a write share its number and precede it.
        self._place: dict[Node, tuple[int, int]] = {node: (i, 0) for i, node in enumerate(cache.graph.nodes)}
        self._by_node = {write.node: write for write in writes}

    def check(self) -> None:
        """Find all readers, and move those forward that stand too late.

        Raises:
            Refusal: a reader needs a version that is gone by then, or is no reader but a writer.
        """
        for _ in range(len(self._place)):
            try:
                self._visit()
                return
            except _Late as late:
                self._move_forward(late)

    def _visit(self) -> None:
        self.buffered.clear()
        self.returned.clear()
        # Views that are not understood, and copies that a later pass may take for views, show all of what they read.
        work = [(node, len(value.writes), value.window) for node, value in self.versions.items()]
        seen = set(self.versions)
        while work:
            node, count, window = work.pop()
            for user in uses(node):
                if self._is_read(node, user):
                    self._read(node, user, count, window)
                if user not in seen and may_be_view(user) and not self._gives_form(node, user):
                    seen.add(user)
                    work.append((user, count, window))

    def _is_read(self, node: Node, user: Node) -> bool:
        write = self._by_node.get(user)
        reads_source = write is not None and node in (*write.operands, write.source)
        # A write into a version gives way to the write in place; of a copy's target only the form matters.
        folded = is_write(user) and user in self.versions and not reads_source
        gives_form = self._gives_form(node, user)
        returns_input = user.op == "output" and node is self.cache
        # A view reads nothing itself, and its own users are looked at.
        viewed = user in self.versions and is_view(user) and is_alias(user, node)
        return not (user in self.ignored or folded or gives_form or returns_input or viewed or is_dead(user))

    @staticmethod
    def _gives_form(node: Node, user: Node) -> bool:
        return user.target is aten.copy.default and user.args[1] is not node

    def _read(self, node: Node, user: Node, count: int, window: Window) -> None:
        """`user` reads `node`, which shows `window` after `count` writes."""
        if is_mutation(user) and user.args[0] is node:
            raise Refusal(f"{user.name} writes {node.name} in place")
        place = self._place[user]
        if user.op == "output":
            older = self.epilogue is None and count < len(self.writes)
            if older or (self.epilogue is not None and count == 0 and is_alias(node, self.cache)):
                raise Refusal(f"{node.name}, which shares memory with {self.cache.name}, is returned")
            self.returned.append(node)
            place = (self._place[node][0], 1)  # it is copied where it stands
        reader = node if user.op == "output" else user
        overwriting = [write for write in self.writes[count:] if not disjoint(write.window, window)]
        for write in overwriting:
            if self._place[write.node] < place:
                reason = f"{reader.name} reads {node.name} after {write.node.name} has overwritten it"
                raise _Late(reader, write, reason)
        # Inductor's scheduler compares where a kernel reads and where it writes, but not once the memory has been
        # written before: it may fuse the reader into the next write, which then overwrites what is yet to be read.
        first = self.writes[0]
        if overwriting and self._place[first.node] < place:
            between = f"{reader.name} reads {node.name} between {first.node.name} and {overwriting[0].node.name}"
            raise _Late(reader, first, f"{between}, and Inductor may put it behind both")
        if overwriting and user in self._by_node and overwriting[0].node is user:
            self.buffered.add(overwriting[0])

    def _move_forward(self, late: _Late) -> None:
        """Have a reader computed before a write, with all that it needs and that stands behind the write."""
        limit = self._place[late.write.node]
        moved: set[Node] = set()
        stack = [late.reader]
        while stack:
            node = stack.pop()
            if node in moved or self._place[node] < limit:
                continue
            newer = node in self.versions and len(self.versions[node].writes) > self.writes.index(late.write)
            if node.op != "call_function" or node.is_impure() or newer or node in self._by_node:
                raise Refusal(str(late))
            moved.add(node)
            stack += node.all_input_nodes
        self._check_memory(moved, late)
        ordered = sorted(moved, key=self._place.__getitem__)
        for nodes in self.earlier.values():
            nodes[:] = [node for node in nodes if node not in moved]
        self.earlier[late.write] = [*self.earlier.get(late.write, ()), *ordered]
        for i, node in enumerate(ordered):
            self._place[node] = (limit[0], i - len(self._place))

    def _check_memory(self, moved: set[Node], late: _Late) -> None:
        """Nothing that is moved reads memory that other nodes of the graph write in place."""
        written = {r for n in self.cache.graph.nodes if is_mutation(n) for r in roots(n.all_input_nodes[0])}
        read = {root for node in moved for source in node.all_input_nodes for root in roots(source)}
        if (written - {self.cache}) & read:
            raise Refusal(str(late))
