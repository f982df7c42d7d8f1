"""A backward in two parts for compiled stages: forward, I and W as three graphs, each compiled by itself.

A compiled function is one node of the autograd graph, so `split_pullback` cannot cut it. Here forward and backward
are traced together before anything is compiled; torch's min-cut partitioner divides them, as it does for every compiled
function, and the backward is divided again: W is what only the gradients of matrices need, I the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from olmo_fn import tree
from olmo_fn.grad import Context, Function, identity
from olmo_fn.parallel.pipeline.zero_bubble import Split
from olmo_fn.tree import Tree

Run: TypeAlias = Callable[[tuple[Tree, ...], Tensor, Context], tuple[Tensor, Split]]


class Parts(NamedTuple):
    """The three functions of a stage, of flat lists of tensors."""

    forward: Function  # (params, x, context) -> (out, *saved)
    input_grad: Function  # (saved, cotangent) -> (dx, *gradients of vectors, *kept for W)
    weight_grad: Function  # (some of saved and cotangent, kept) -> gradients of the others
    needs: tuple[int, ...]  # which of (saved, cotangent) weight_grad takes
    early: tuple[int, ...]  # which params are vectors
    late: tuple[int, ...]


def in_parts(fn: Function, wrap: Callable[[Function], Function] = identity) -> Run:
    """``fn(*subtrees, x, context) -> Tensor`` as a function that also returns its pullback in two parts.

    ``(subtrees, x, context) -> (out, split)``; ``split.weight_grad()`` gives the gradients in the order of the subtrees'
    leaves. ``wrap`` compiles each of the three graphs, which are traced once for all arguments of the same shapes.

    >>> run = in_parts(lambda w, x, context: (x @ w) ** 2)
    >>> out, (input_grad, weight_grad) = run((torch.tensor([[2.0]]),), torch.tensor([[3.0]]), {})
    >>> out, input_grad(torch.ones(1, 1)), weight_grad()
    (tensor([[36.]]), tensor([[24.]]), [tensor([[36.]])])
    """
    traced: dict[Any, Parts] = {}

    def run(params: tuple[Tree, ...], x: Tensor, context: Context) -> tuple[Tensor, Split]:
        flat = [*_leaves(params), x, *context.values()]
        key = tuple(context), *((t.shape, t.stride(), t.dtype, t.device) for t in flat)
        with torch.no_grad():
            flat = [t.detach() for t in flat]
            if key not in traced:
                parts = trace(fn, params, x, context)
                traced[key] = parts._replace(
                    forward=wrap(parts.forward), input_grad=wrap(parts.input_grad), weight_grad=wrap(parts.weight_grad)
                )
            parts = traced[key]
            out, *saved = parts.forward(*flat)
        return out, _split(parts, saved)

    return run


def _split(parts: Parts, saved: list[Tensor]) -> Split:
    later: list[Tensor] = []
    found: dict[int, Tensor] = {}

    @torch.no_grad()
    def input_grad(cotangent: Tensor) -> Tensor:
        given = [*saved, cotangent]
        saved.clear()
        grad, *rest = parts.input_grad(*given)
        found.update(zip(parts.early, rest, strict=False))
        later.extend([*(given[i] for i in parts.needs), *rest[len(parts.early) :]])
        return grad

    @torch.no_grad()
    def weight_grad() -> list[Tensor]:
        given = list(later)
        later.clear()
        found.update(zip(parts.late, parts.weight_grad(*given), strict=True))
        return [found.pop(i) for i in sorted(found)]

    return Split(input_grad, weight_grad)


def trace(fn: Function, params: tuple[Tree, ...], x: Tensor, context: Context) -> Parts:
    """Trace ``fn`` and its backward at these arguments' shapes, and divide them."""
    leaves, names = _leaves(params), list(context)

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:  # names that the partitioner looks for
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in primals[: len(leaves) + 1]]
            values = iter(inputs)
            subtrees = tuple(tree.map(lambda _: next(values), p) for p in params)
            out = fn(*subtrees, next(values), dict(zip(names, primals[len(inputs) :], strict=True)))
            grads = torch.autograd.grad(out, [inputs[-1], *inputs[:-1]], tangents)
        return [out.detach(), *grads]

    with torch.no_grad():
        out = fn(*params, x, context)
        primals = [t.detach() for t in (*leaves, x, *context.values())]
        graph = make_fx(joint, select_decomp_table(), tracing_mode="fake")(primals, [torch.empty_like(out)])
    forward, backward = min_cut_rematerialization_partition(graph, None, num_fwd_outputs=1)
    given = backward.graph.find_nodes(op="placeholder")
    saved = [node.name for node in _outputs(forward)[1:]]
    assert saved == [node.name for node in given[:-1]], "the partitioner hands on in another order than it takes"
    dx, *grads = _outputs(backward)
    early = [i for i, leaf in enumerate(leaves) if leaf.ndim < 2]
    late = [i for i, leaf in enumerate(leaves) if leaf.ndim >= 2]
    done, wanted = [dx, *(grads[i] for i in early)], [grads[i] for i in late]
    second = _ancestors(wanted) - _ancestors(done) - set(given)
    border = [n for n in backward.graph.nodes if n not in second and (n in wanted or second & n.users.keys())]
    needs, kept = [n for n in border if n in given], [n for n in border if n not in given]
    return Parts(
        forward,
        _extract(backward, given, [*done, *kept]),
        _extract(backward, [*needs, *kept], wanted),
        tuple(given.index(node) for node in needs),
        tuple(early),
        tuple(late),
    )


def _leaves(params: tuple[Tree, ...]) -> list[Tensor]:
    return [leaf for p in params for _, leaf in tree.items(p)]


def _outputs(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.output_node().args[0])  # type: ignore[arg-type]


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _extract(module: fx.GraphModule, inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """The part of a graph that computes ``outputs`` from ``inputs``, which may be inner nodes."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    needed: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            stack += node.all_input_nodes
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output([copies[node] for node in outputs])
    return fx.GraphModule(module, graph)
