"""A mixture of experts as a sublayer: a router, the experts it sends tokens to, and a network that all tokens share.

B batch, R positions of a rank, D model width, E experts, k of them for a token, F their hidden width, L a latent width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from olmo_fn.core.chain import Aux, Metric, wide
from olmo_fn.mesh.collectives import all_gather, enter, reduce_scatter
from olmo_fn.nn.context import Context
from olmo_fn.nn.experts import Dispatch, Work, by_experts
from olmo_fn.nn.feed_forward import Activation, gated
from olmo_fn.nn.linear import merged
from olmo_fn.nn.norm import Norm
from olmo_fn.nn.router import METRICS, RouterForm, route, within_capacity
from olmo_fn.nn.sublayer import Names, Result, Sublayer
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree

SharedMix: TypeAlias = Literal["add", "average", "gate"]


@dataclass(frozen=True, kw_only=True)
class MoEForm:
    """A layer's mixture of experts in numbers; see `olmo_fn.models.settings.moe.MoE` for what they mean."""

    d_model: int
    router: RouterForm
    hidden: int
    std: float
    std_down: float
    activation: Activation = "silu"
    shared: int = 0
    shared_mix: SharedMix = "add"
    latent: int = 0
    latent_norm: bool = False
    norm_eps: float = 1e-6
    dispatch: Dispatch = "auto"

    @property
    def width(self) -> int:
        """Of what goes to the experts."""
        return self.latent or self.d_model


def moe_sublayer(form: MoEForm) -> Sublayer:
    """``Σ over the k experts e of a token of  weight_e · (act(x w_gate_e) · (x w_up_e)) w_down_e``, and what all tokens share.

    ``w_router`` (D, E); ``experts``: ``w_gate`` (E, D, F), ``w_up`` (E, D, F), ``w_down`` (E, F, D); ``router_bias`` (E,),
    which no gradient moves (`olmo_fn.transforms.balance`); ``shared``: those of a gated network. With a latent width (NVIDIA
    2025, LatentMoE) ``w_latent_in`` (D, L) makes what goes to the experts, and ``w_latent_out`` (L, D) of what comes back.

    A capacity holds where there is a loss, in training and evaluation. Where there are no labels, in decoding and logits, every
    expert takes all that is sent to it: an expert's even share of what is decoded at once says nothing about a sequence.
    """
    D, E, F, width, router = form.d_model, form.router.experts, form.hidden, form.width, form.router

    def apply(p: Tree, x: Tensor, ctx: Context) -> Result:
        axes, B = ctx.backend.axes, len(x)
        routed = route(ctx, router, p, x)
        h = x if not form.latent else x @ enter(merged(p["w_latent_in"]), axes.tp)
        h, weights = all_gather(h, 1, axes.tp), all_gather(routed.weights, 1, axes.tp)
        experts = all_gather(routed.experts, 1, axes.tp)
        matrices = tuple(merged(p["experts"][name]) for name in ("w_gate", "w_up", "w_down"))
        N = h.shape[0] * h.shape[1]
        drops = router.capacity_factor is not None and ctx.labels is not None
        kept, most = within_capacity(ctx, router, experts) if drops else (None, 0)
        work = Work(
            h.reshape(N, width),
            experts.view(N, -1),
            weights.reshape(N, -1),
            E,
            matrices,  # type: ignore[arg-type]
            form.activation,
            None if kept is None else kept.view(N, -1),
            most,
        )
        arriving = by_experts(ctx, work, form.dispatch)
        shared = None if not form.shared else _shared(p["shared"], x, ctx)  # meanwhile
        y = reduce_scatter(arriving().view(B, -1, width), 1, axes.tp)
        if form.latent:
            y = Norm(form.norm_eps)(ctx, p["latent_norm"], y) if form.latent_norm else y
            y = y @ enter(merged(p["w_latent_out"]), axes.tp)
        metrics = {**routed.metrics, "dropped": _dropped(kept, routed.metrics["load"])}
        return mixed(y, shared), Aux(routed.loss, metrics)

    def _shared(p: Tree, x: Tensor, ctx: Context) -> Tensor:
        y = gated(ctx, x, p["w_gate"], p["w_up"], p["w_down"], form.activation)
        if form.shared_mix != "gate":
            return y
        gate = wide(x) @ wide(enter(p["w_mix"], ctx.backend.axes.tp))
        return y * gate.sigmoid()[..., None].to(y.dtype)

    def mixed(y: Tensor, shared: Tensor | None) -> Tensor:
        if shared is None:
            return y
        return (shared + router.top_k * y) / (router.top_k + 1) if form.shared_mix == "average" else shared + y

    trunc, down = Init("trunc_normal", form.std), Init("trunc_normal", form.std_down)
    specs: Tree = {
        "w_router": Spec((D, E), ("embed", "choice"), trunc),
        **({"router_bias": Spec((E,), ("choice",), Init("zeros"))} if router.biased else {}),
        "experts": {
            "w_gate": Spec((E, width, F), ("experts", "embed", "mlp"), trunc),
            "w_up": Spec((E, width, F), ("experts", "embed", "mlp"), trunc),
            "w_down": Spec((E, F, width), ("experts", "mlp", "embed"), down),
        },
    }
    if form.shared:
        specs["shared"] = {
            "w_gate": Spec((D, form.shared), ("embed", "mlp"), trunc),
            "w_up": Spec((D, form.shared), ("embed", "mlp"), trunc),
            "w_down": Spec((form.shared, D), ("mlp", "embed"), down),
            **({"w_mix": Spec((D,), ("embed",), trunc)} if form.shared_mix == "gate" else {}),
        }
    if form.latent:
        specs["w_latent_in"] = Spec((D, width), ("embed", "latent"), trunc)
        specs["w_latent_out"] = Spec((width, D), ("latent", "embed"), down)
        if form.latent_norm:
            specs["latent_norm"] = Spec((width,), ("latent",), Init("ones"))
    return Sublayer(
        "moe",
        specs=specs,
        apply=apply,
        flops=lambda length: 2 * length * active(form),
        divided=("tp", "cp"),
        metrics={**METRICS, "load": Metric("sum", (E,)), "dropped": Metric("sum")},
        names=names_of(form),
        idle=(E - router.top_k) * 3 * width * F,
    )


def active(form: MoEForm) -> int:
    """Entries of matrices that one token meets."""
    routed = form.router.top_k * 3 * form.width * form.hidden
    shared = 3 * form.d_model * form.shared + (form.d_model if form.shared_mix == "gate" and form.shared else 0)
    return form.d_model * form.router.experts + routed + shared + 2 * form.d_model * form.latent


def _dropped(kept: Tensor | None, load: Tensor) -> Tensor:
    """Choices that no expert had room for."""
    return load.new_zeros(()) if kept is None else (~kept).sum().to(load.dtype)


MOE_NAMES = {
    "w_router": Names("mlp.gate.weight", "feed_forward_moe.router.weight"),
    "router_bias": Names("mlp.gate.e_score_correction_bias", "feed_forward_moe.router.score_bias"),
    "experts.w_gate": Names("mlp.experts.{}.gate_proj.weight", "feed_forward_moe.experts.mlp.w1"),
    "experts.w_up": Names("mlp.experts.{}.up_proj.weight", "feed_forward_moe.experts.mlp.w3"),
    "experts.w_down": Names("mlp.experts.{}.down_proj.weight", "feed_forward_moe.experts.mlp.w2"),
    "shared.w_gate": Names("mlp.shared_expert.gate_proj.weight", "feed_forward_moe.shared_mlp.w1.weight"),
    "shared.w_up": Names("mlp.shared_expert.up_proj.weight", "feed_forward_moe.shared_mlp.w3.weight"),
    "shared.w_down": Names("mlp.shared_expert.down_proj.weight", "feed_forward_moe.shared_mlp.w2.weight"),
    "shared.w_mix": Names("mlp.shared_expert_gate.weight", "feed_forward_moe.shared_gate.weight"),
    "w_latent_in": Names("mlp.latent_in.weight", "feed_forward_moe.latent_down_proj.weight"),
    "w_latent_out": Names("mlp.latent_out.weight", "feed_forward_moe.latent_up_proj.weight"),
    "latent_norm": Names("mlp.latent_norm.weight", "feed_forward_moe.latent_up_proj_input_norm.weight"),
}


def names_of(form: MoEForm) -> dict[str, Names]:
    """What the parameters are called elsewhere. OLMo-core keeps matrices of all experts in one with fewer dims; those that come
    from the stream lie there as here where there is a capacity, and as (out, in) where there is none.
    """
    D, E, F, width = form.d_model, form.router.experts, form.hidden, form.width
    whole = form.router.capacity_factor is None
    flat = {
        "w_router": (True, (E * D,)),
        "experts.w_gate": (whole, (E * F, width) if whole else (E * width, F)),
        "experts.w_up": (whole, (E * F, width) if whole else (E * width, F)),
        "experts.w_down": (False, (E * F, width)),
    }
    found = {name: MOE_NAMES[name]._replace(turned=turned, shape=shape) for name, (turned, shape) in flat.items()}
    return MOE_NAMES | found | {"shared.w_mix": MOE_NAMES["shared.w_mix"]._replace(huggingface_shape=(1, D))}
