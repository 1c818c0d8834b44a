"""Changed copies of an input that are returned, while the input itself is overwritten with something else.

`y = slice_scatter(x, ...)`, then `x.zero_()`: stock Inductor sees that `x` is written anyway, makes `y` in the memory
of `x`, and returns zeros for it. A copy in front of the first write keeps the two apart.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from fusion_passes.patterns._copies_aliases import aliases, may_be_view
from fusion_passes.patterns._copies_chain import aside, finish
from fusion_passes.patterns._copies_values import Values, is_write


def changed_copies(epilogue: Node, values: Values) -> list[Node]:
    """The writes into the target of `epilogue` whose results are returned and do not lead to what it copies there."""
    target, last = epilogue.args[:2]
    assert isinstance(target, Node) and isinstance(last, Node)
    final = values.of(last)
    leading = {write.node for write in final.writes} if final.origin is target else set()
    output = target.graph.output_node()
    found = []
    for view in aliases(target):
        for user in view.users:
            if is_write(user) and user.args[0] is view and user not in leading:
                versions = _later_versions(user)
                if last not in versions and any(output in node.users for node in versions):
                    found.append(user)
    return sorted(found)


def _later_versions(write: Node) -> set[Node]:
    """What may be in the memory that `write` changes: its views, and further writes into them."""
    found: set[Node] = set()
    stack = [write]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [u for u in node.users if may_be_view(u) or (is_write(u) and u.args[0] is node)]
    return found


def keep_apart(graph: Graph, changed: list[Node]) -> None:
    """Let each of the writes go into a copy of its own."""
    before = set(graph.nodes)
    buffers: dict[Node, Node] = {}
    try:
        for write in changed:
            into = write.args[0]
            assert isinstance(into, Node)
            with graph.inserting_before(write):
                buffers[write] = aside(graph, into)
    except BaseException:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        raise
    for write, buffer in buffers.items():
        write.update_arg(0, buffer)
    trace = {k: v for k, v in changed[0].meta.items() if k == "stack_trace"}
    finish(graph, before, trace)
