"""float8: the products of the blocks' linears with both factors quantised to e4m3, and gradients of weights in the dtype of the
computation.

    step = pipe(loss, float8("rowwise"), grad(dtype=torch.bfloat16), adamw(1e-3))

What a weight is quantised to, and how: `olmo_fn.kernels.float8`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from olmo_fn import tree
from olmo_fn.core.chain import Chain, Stage
from olmo_fn.core.pipe import QUANTISES, Loss, Transform
from olmo_fn.kernels.float8 import Float8, Form, Recipe, check_shape
from olmo_fn.mesh.axis import Axes, CPMethod
from olmo_fn.spec import Spec
from olmo_fn.tree import Tree

LINEAR = ("blocks.*.attention.w_*", "blocks.*.feed_forward.w_*", "blocks.*.moe.shared.w_[gud]*")
"""The matrices of the blocks that are used in products only, and that all tokens meet: what a model has of them. Not those of
embedding and head, and not experts', whose products are of groups."""
DIVIDED = ("heads", "kv_heads", "mlp")  # logical axes that are sharded over tp in use


def float8(recipe: Recipe = "rowwise", skip: Sequence[str] = (), patterns: Sequence[str] = LINEAR) -> Transform[Loss, Loss]:
    """Quantise the matrices whose path matches ``patterns`` and none of ``skip``, and what they are multiplied with. Goes
    before ``grad``, and after `olmo_fn.transforms.lora.lora`, whose adapters stay as they are.

    ValueError for a loss that is no chain, a pattern of ``skip`` that matches nothing, and for matrices whose dims are no
    multiples of 16 (``rowwise``) or 32 (``mx``).
    """

    def apply(loss: Loss) -> Loss:
        if not isinstance(loss.fn, Chain):
            raise ValueError(
                "float8 quantises the matrices of a Chain's stages, and this loss is a plain function; leave it out"
            )
        chain = loss.fn
        forms = forms_of(chain.specs, recipe, skip, patterns)
        specs = tree.flatten(chain.specs)

        def check(axes: Axes, cp_method: CPMethod) -> None:
            chain.check(axes, cp_method)
            for path, form in forms.items():
                divided = {dim: axes.tp.size for dim, name in enumerate(specs[path].axes) if name in DIVIDED}
                check_shape(path, specs[path].shape, form, divided)
                if axes.fsdp.size > 1 and "embed" in specs[path].axes:
                    dim = specs[path].axes.index("embed")
                    form.check_part(path, dim, -(-specs[path].shape[dim] // axes.fsdp.size))

        marked = chain.changed(lambda stage: _with_forms(stage, forms))
        return replace(loss, fn=replace(marked, float8=forms, check=check))

    return Transform(f"float8({recipe!r})", Loss, Loss, apply, frozenset({QUANTISES}))


def forms_of(specs: Tree, recipe: Recipe, skip: Sequence[str] = (), patterns: Sequence[str] = LINEAR) -> dict[str, Form]:
    """How each matrix is quantised, by path. Scales lie along the dim ``embed``, over which FSDP shards.

    >>> from olmo_fn.spec import Init
    >>> w = Spec((64, 32), ("embed", "mlp"), Init("zeros"))
    >>> forms_of({"blocks": {"0": {"attention": {"w_q": w}, "feed_forward": {"w_up": w}}}}, "rowwise", skip=["*.w_q"])
    {'blocks.0.feed_forward.w_up': Form(recipe='rowwise', dim=0)}
    """
    patterns = tree.present(specs, LINEAR) if tuple(patterns) == LINEAR else patterns
    chosen = tree.flatten(tree.partition(specs, patterns)[0])
    left_out = set(tree.flatten(tree.partition(specs, skip)[0])) if skip else set()
    forms = {path: form for path, spec in chosen.items() if path not in left_out and (form := _form(spec, recipe))}
    for path, form in forms.items():
        check_shape(path, chosen[path].shape, form)
    return forms


def _form(spec: Spec, recipe: Recipe) -> Form | None:
    if len(spec.shape) != 2:
        return None
    return Form(recipe, spec.axes.index("embed") if recipe == "rowwise" and "embed" in spec.axes else 0)


def _with_forms(stage: Stage, forms: dict[str, Form]) -> Stage:
    """The stage, which marks its matrices as to be quantised where they have come into use without, as for ``torch.func``."""
    if not any(top in stage.paths for path in forms for top in tree.ancestors(path)):
        return stage

    def mark(path: str, p: Any) -> Any:
        return Float8(p, None, forms[path]) if path in forms and not isinstance(p, Float8) else p

    def fn(p: Tree, x: Any, ctx: Any) -> Any:
        if ctx.backend.primitive is None:
            p = {key: tree.map_with_path(mark, p[key], prefix=path) for key, path in stage.params}
        return stage.fn(p, x, ctx)

    return stage._replace(fn=fn)
