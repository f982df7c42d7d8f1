"""LoRA (Hu et al. 2021): train a low-rank change of some matrices, W + (alpha / r) B A, and leave W alone.

A transform of parameters: the adapters are a tree of their own, under ``lora`` beside the model's parameters, and the loss sees
the sum. B starts at zero, so that training starts at the model.

    adapters = lora_specs(specs, rank=8)
    step = pipe(loss, lora(adapters, alpha=16), grad(), adamw(1e-4), train_only("lora.*", parameters={**specs, **adapters}))
    state = step.init({**params, **init(adapters, seed)})
    merged = merge_lora(state.params, alpha=16)     # an ordinary model
    adapters_alone = {"lora": state.params["lora"]}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Chain, LossFunction, Metrics, Stage
from olmo_fn.core.pipe import QUANTISES, Loss, Transform
from olmo_fn.mesh.axis import Axes, CPMethod
from olmo_fn.nn.linear import Adapted
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree

LINEAR = ("*.attention.w_*", "*.feed_forward.w_*")
"""The matrices of mixers and of dense feed-forward networks: what a model has of them."""


def lora_specs(specs: Tree, rank: int, patterns: Sequence[str] = LINEAR) -> Tree:
    """Adapters of rank ``rank`` for the matrices whose path matches: ``lora.<path>.a`` (..., r, n) and ``.b`` (..., m, r).

    ``a`` is normal with variance 1 / n, ``b`` is zero. Leading dims, of stacked matrices such as experts, are kept. ValueError
    for a pattern that matches nothing, for what is no matrix, and for a rank that is not lower than full.

    >>> ones = Init("ones")
    >>> adapters = lora_specs({"w": Spec((4, 6), ("embed", "mlp"), ones)}, rank=2, patterns=["w"])
    >>> [(path, spec.shape) for path, spec in tree.items(adapters)]
    [('lora.w.a', (2, 6)), ('lora.w.b', (4, 2))]
    """
    patterns = tree.present(specs, LINEAR) if tuple(patterns) == LINEAR else patterns
    adapters: dict[str, Spec] = {}
    for path, spec in tree.items(tree.partition(specs, patterns)[0]):
        if len(spec.shape) < 2:
            raise ValueError(
                f"lora: {path} is no matrix, its shape is {spec.shape}; give patterns of matrices, such as {LINEAR[0]}"
            )
        *stack, m, n = spec.shape
        *stack_axes, m_axis, n_axis = spec.axes
        if not 1 <= rank < min(m, n):
            raise ValueError(f"lora: rank {rank} of {path}, which is {m} x {n}; it must be from 1 to {min(m, n) - 1}")
        adapters[f"lora.{path}.a"] = Spec((*stack, rank, n), (*stack_axes, "rank", n_axis), Init("normal", n**-0.5))
        adapters[f"lora.{path}.b"] = Spec((*stack, m, rank), (*stack_axes, m_axis, "rank"), Init("zeros"))
    return tree.unflatten(adapters)


def adapted(w: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """``w + (alpha / r) b a`` (..., m, n), summed in fp32 at least, in the dtype of ``w``."""
    wide = torch.promote_types(w.dtype, torch.float32)
    return (w.to(wide) + (alpha / a.shape[-2]) * (b.to(wide) @ a.to(wide))).to(w.dtype)


def merge_lora(params: Tree, alpha: float) -> Tree:
    """The parameters without adapters, each adapted matrix replaced by the sum: an ordinary model that computes the same.

    Parameters without adapters stay as they are.
    """
    return _merged({name: value for name, value in params.items() if name != "lora"}, params.get("lora"), alpha)


def lora(adapters: Tree, alpha: float = 16.0) -> Transform[Loss, Loss]:
    """The loss at the adapted parameters; goes before ``grad``. ``adapters``: what `lora_specs` gives.

    In a chain each stage's matrices become `olmo_fn.nn.linear.Adapted` ones, whose products are added: no whole matrix is
    made, and none has a gradient. Optimizer memory is only that of the adapters.
    """
    paths = {path.removesuffix(".a") for path, _ in tree.items(adapters["lora"]) if path.endswith(".a")}

    def apply(loss: Loss) -> Loss:
        if not isinstance(loss.fn, Chain):
            return replace(loss, fn=lora_loss(loss.fn, alpha))
        chain = loss.fn.changed(lambda stage: _with_adapters(stage, paths, alpha))

        def check(axes: Axes, cp_method: CPMethod) -> None:
            if axes.tp.size > 1:
                raise ValueError("LoRA adapts whole matrices, and --mesh.tp cuts them; use --mesh.dp-shard for adapters")
            chain.check(axes, cp_method)

        return replace(loss, fn=replace(chain, check=check, specs=chain.specs and {**chain.specs, **adapters}))

    late = {QUANTISES: "would adapt weights that are quantised already"}
    return Transform(f"lora(alpha={alpha})", Loss, Loss, apply, not_after=late)


def lora_loss(loss: LossFunction, alpha: float) -> LossFunction:
    """A plain loss, at the adapted parameters."""

    def at_adapted(params: Tree, batch: Batch) -> tuple[Tensor, Metrics]:
        return loss(merge_lora(params, alpha), batch)

    return at_adapted


def _merged(params: Any, adapters: Any, alpha: float) -> Any:
    if adapters is None:
        return params
    if not isinstance(params, Mapping):
        return adapted(params, adapters["a"], adapters["b"], alpha)
    return {name: _merged(value, adapters.get(name), alpha) for name, value in params.items()}


def _with_adapters(stage: Stage, paths: Collection[str], alpha: float) -> Stage:
    """The stage with adapted matrices in its parameters: those at ``paths``, inside the subtrees that it uses."""
    tops = {key: path for key, path in stage.params if any(p == path or p.startswith(f"{path}.") for p in paths)}
    if not tops:
        return stage

    def fn(p: Tree, x: Any, ctx: Any) -> Any:
        adapted = {key: _adapt(p[key], p[f"lora {key}"], alpha) for key in tops}
        return stage.fn({**p, **adapted}, x, ctx)

    more = tuple((f"lora {key}", f"lora.{path}") for key, path in tops.items())
    return stage._replace(params=stage.params + more, fn=fn)


def _adapt(params: Any, adapters: Any, alpha: float) -> Any:
    if adapters is None:
        return params
    if not isinstance(params, Mapping):
        return Adapted(params, adapters["a"], adapters["b"], alpha / adapters["a"].shape[-2])
    return {name: _adapt(value, adapters.get(name), alpha) for name, value in params.items()}
