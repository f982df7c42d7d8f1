"""A backward in two parts: first the input's gradient, which the rank before waits for, and later the weights'.

Qi et al. 2023 (arXiv 2401.10241, section 2) name them B and W; here they are I and W. A node of the autograd graph is on the
*path* if it leads to the input. Where an edge leaves the path for a weight, the node that it leaves is a *fork*, such as the
product of an activation and a matrix. I walks the path and keeps the gradients that come to the forks; W goes on from
there, to the weights only. So both together do what one backward does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

Arrived: TypeAlias = dict[Node, tuple[Tensor | None, ...]]


class Split(NamedTuple):
    """The two halves of a pullback. Each is called once, ``input_grad`` first."""

    input_grad: Callable[[Tensor], Tensor | None]
    """From the cotangent of ``root`` to that of ``x``; None without an ``x``."""
    weight_grad: Callable[[], list[Tensor]]
    """The gradients of ``leaves``, in their order."""


class Saved(saved_tensors_hooks):
    """A context that knows the tensors which autograd saves in it, so that they can be dropped before the graph is.

    torch applies only the innermost of nested hooks; ``pack`` and ``unpack`` are others' to be applied as well.
    """

    def __init__(self, pack: Callable[[Tensor], Any] = Tensor.detach, unpack: Callable[[Any], Tensor] = lambda x: x) -> None:
        cells: list[list[Any]] = []
        touched: set[int] = set()

        def pack_cell(tensor: Tensor) -> list[Any]:
            cells.append([pack(tensor)])
            return cells[-1]

        def unpack_cell(cell: list[Any]) -> Tensor:
            touched.add(id(cell))
            return unpack(cell[0])

        super().__init__(pack_cell, unpack_cell)
        self.cells, self.touched = cells, touched

    def keep(self, nodes: Iterable[Node]) -> None:
        """Drop what these nodes have not saved, and leave the rest to them."""
        self.touched.clear()
        for node in nodes:
            for name in dir(node):
                if name.startswith("_saved_") or name == "saved_tensors":
                    getattr(node, name)  # unpacks it
        for cell in self.cells:
            if id(cell) not in self.touched:
                cell.clear()
        self.forget()

    def forget(self) -> None:
        """Leave all tensors to their nodes."""
        self.cells.clear()


def split_pullback(root: Tensor, leaves: Sequence[Tensor], x: Tensor | None, saved: Saved | None = None) -> Split:
    """Split the pullback of ``root``, which was computed from ``leaves`` and ``x``; all of them require gradients.

    ``saved``, the context in which ``root`` was computed: what W does not need is freed after I. Without an ``x``, W does
    everything. Gradients of vectors, such as the gains of norms, are computed in I: that is little work, and W would have
    to keep activations for it. So are those of a fork that computes all its gradients at once: a Python
    ``autograd.Function`` that takes the weight, or a compiled function, where nothing is left for W; see `traced`.

    >>> w, x = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    >>> input_grad, weight_grad = split_pullback((x @ w) ** 2, [w], x)
    >>> input_grad(torch.ones(1, 1)), weight_grad()
    (tensor([[24.]]), [tensor([[36.]])])
    """
    if x is None:
        return _all_late(root, leaves)
    edges = [get_gradient_edge(leaf) for leaf in leaves]
    whole = _groups(get_gradient_edge(root).node, get_gradient_edge(x).node, [edge.node for edge in edges])
    late = [group for group in whole if not group.opaque and all(leaves[i].ndim > 1 for i in group.leaves)]
    early = sorted(set(range(len(leaves))).difference(*(group.leaves for group in late)))
    graph: list[Any] = [root, late]  # emptied when it is not needed any more
    arrived: Arrived = {}
    found: dict[int, Tensor] = {}
    del root, whole, late

    def input_grad(cotangent: Tensor) -> Tensor:
        root, late = graph
        graph[0] = None
        handles = [fork.register_prehook(_keeper(arrived, fork)) for group in late for fork in group.forks]
        try:
            wanted = [get_gradient_edge(x), *(edges[i] for i in early)]
            grad, *rest = torch.autograd.grad([root], wanted, [cotangent.to(root.dtype)], retain_graph=bool(late))
        finally:
            for handle in handles:
                handle.remove()
        found.update(zip(early, rest, strict=True))
        if saved is not None:
            if all(len(group.forks) == 1 for group in late):  # or else W goes along the path again
                saved.keep(node for group in late for node in (*group.forks, *group.beside))
            saved.forget()
        return grad

    def weight_grad() -> list[Tensor]:
        for group in sorted(graph.pop(), key=lambda group: -len(group.forks)):  # those that need the path first
            found.update(zip(group.leaves, _from_forks(group, edges, arrived), strict=True))
        return [found.pop(i) for i in range(len(leaves))]

    return Split(input_grad, weight_grad)


def _all_late(root: Tensor, leaves: Sequence[Tensor]) -> Split:
    kept: list[Tensor] = []
    return Split(kept.append, lambda: list(torch.autograd.grad(root, leaves, kept.pop().to(root.dtype))))


class _Group(NamedTuple):
    """Weights that are reached from the same forks."""

    leaves: list[int]
    forks: list[Node]
    beside: list[Node]  # the nodes between forks and weights
    opaque: bool  # a fork computes all its gradients or none


def _groups(root: Node, x: Node, leaves: list[Node]) -> list[_Group]:
    order = _postorder(root)
    compiled = any(node.name() == "CompiledFunctionBackward" for node in order)  # may not be run twice at all
    path, below = {x}, {node: {i for i, leaf in enumerate(leaves) if leaf is node} for node in order}
    groups: list[_Group] = []
    for node in order:  # inputs before what is computed from them
        following = [after for after, _ in node.next_functions if after is not None]
        if any(after in path for after in following):
            path.add(node)
        beside = [after for after in following if after not in path and below[after]]
        if node not in path:
            below[node].update(*(below[after] for after in beside))
        elif beside:
            mine = set().union(*(below[after] for after in beside))
            same = [group for group in groups if not mine.isdisjoint(group.leaves)]
            groups = [group for group in groups if mine.isdisjoint(group.leaves)]
            joined = mine.union(*(group.leaves for group in same))
            forks = [node, *(fork for group in same for fork in group.forks)]
            opaque = compiled or any(isinstance(fork, BackwardCFunction) for fork in forks)
            groups.append(_Group(sorted(joined), forks, [], opaque))
    for group in groups:
        group.beside.extend(node for node in order if node not in path and not below[node].isdisjoint(group.leaves))
    return groups


def _postorder(root: Node) -> list[Node]:
    """Every node of the graph, after all that it leads to."""
    order: dict[Node, None] = {}
    stack = [(root, False)]
    while stack:
        node, seen = stack.pop()
        if seen:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions if after is not None and after not in order]
    return list(order)


def _keeper(arrived: Arrived, fork: Node) -> Callable[..., None]:
    def keep(grads: tuple[Tensor | None, ...]) -> None:
        arrived[fork] = grads

    return keep


def _from_forks(group: _Group, edges: list[GradientEdge], arrived: Arrived) -> tuple[Tensor, ...]:
    """Gradients of a group's weights. One fork may lead to another; what comes to it that way has already been counted."""
    several = len(group.forks) > 1
    grads = {fork: arrived.pop(fork) for fork in group.forks}
    starts = [(GradientEdge(fork, i), g) for fork in group.forks for i, g in enumerate(grads[fork]) if g is not None]
    handles = [fork.register_prehook(lambda _, own=grads[fork]: own) for fork in group.forks] if several else []
    try:
        roots, cotangents = zip(*starts, strict=True)
        return torch.autograd.grad(roots, [edges[i] for i in group.leaves], cotangents, retain_graph=several)
    finally:
        for handle in handles:
            handle.remove()
