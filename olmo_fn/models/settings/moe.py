"""Settings of mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from olmo_fn.fields import POSITIVE, Range
from olmo_fn.models.settings.feed_forward import SwiGLU
from olmo_fn.models.settings.sublayer import WIDTH, FeedForwardSettings, check_positive, divisors

if TYPE_CHECKING:
    from olmo_fn.models.config import Model
    from olmo_fn.nn.router import RouterForm
    from olmo_fn.nn.sublayer import Sublayer


@dataclass(frozen=True, kw_only=True)
class MoE(FeedForwardSettings):
    """A mixture of experts (Shazeer et al. 2017): each token goes to a few of many feed-forward networks."""

    name: tyro.conf.Suppress[Literal["moe"]] = "moe"
    num_experts: Annotated[int, Range(1, 1 << 16)] = 64  # type: ignore[misc]
    """How many experts there are."""
    top_k: Annotated[int, Range(1, 1 << 16)] = 8
    """How many of them a token goes to."""
    expert_size: Annotated[int, WIDTH] = 1024
    """Hidden width of each expert."""
    shared_size: Annotated[int, Range(0, 1 << 24)] = 0
    """Hidden width of a network beside them that all tokens go through; 0: there is none."""
    shared_mix: Literal["add", "average", "gate"] = "add"
    """How that comes in: added; averaged, as one expert more (OLMo-core); or times a learned gate of the token (Qwen)."""
    dense_layers: Annotated[int, Range(0, 1024)] = 0
    """The first so many layers have a dense network instead."""
    dense_size: Annotated[int, WIDTH] = 8192
    """Hidden width of these."""
    latent_size: Annotated[int, Range(0, 1 << 24)] = 0
    """Width to which tokens are projected on their way to the experts (LatentMoE); 0: they go as they are."""
    latent_norm: bool = False
    """A norm of what comes back, before it is projected to the stream's width."""

    gating: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits."""
    weight_norm: Annotated[float | None, POSITIVE] = None
    """Divide a token's weights by their p-norm, with this p; 1: they add up to 1 (Qwen, Mixtral)."""
    weight_scale: Annotated[float, POSITIVE] = 1.0
    """Multiply weights by this (DeepSeek-V3); --model.top-k restores the scale of a dense network (OLMo 3 MoE)."""
    expert_groups: Annotated[int, Range(1, 1 << 16)] = 1
    """Groups of experts, of which a token goes to some only: those of one machine, say."""
    top_groups: Annotated[int, Range(1, 1 << 16)] = 1
    """How many of the groups a token may go to."""
    jitter: Annotated[float, Range(0, 1, below=True)] = 0.0
    """While training, multiply what the router sees by random numbers between 1 - this and 1 + this."""

    capacity_factor: Annotated[float | None, POSITIVE] = None
    """Tokens that an expert takes, as a multiple of an even share; more are dropped, in their order. None: it takes all."""
    capacity_over: Literal["sequence", "batch"] = "sequence"
    """Of which tokens that is a share: those of a sequence, which no layout changes, or of all that are computed at once."""
    balance_loss: Annotated[float, Range(0, 1e9)] = 0.01
    """Weight of the loss that makes the loads of experts even, divided by the number of layers."""
    balance_over: Literal["batch", "sequence"] = "batch"
    """Over which tokens loads are to be even: all sequences that are computed at once, on all processes, or each sequence."""
    router_z_loss: Annotated[float, Range(0, 1e9)] = 0.001
    """Weight of the loss that keeps the router's logits small, divided by the number of layers."""
    balance_rate: Annotated[float, Range(0, 1e9)] = 0.0  # type: ignore[misc]
    """How far a bias of each expert's score moves in a step, towards even loads, without a loss (Wang et al. 2024)."""
    dispatch: Literal["auto", "exchange", "gather"] = "auto"
    """Over --mesh.ep: tokens travel to their experts and back, or all tokens are gathered everywhere; auto: what is less."""

    @property
    def drops(self) -> bool:
        """Whether training wants to know the numbers of sequences: for jitter."""
        return self.jitter > 0

    def at(self, layer: int) -> FeedForwardSettings:
        """The settings of layer ``layer``: of the first ones those of a dense network."""
        return SwiGLU(hidden_size=self.dense_size) if layer < self.dense_layers else self

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``: one of the dense ones, or a mixture."""
        if (dense := self.at(layer)) is not self:
            return dense.build(model, layer)
        from olmo_fn.nn.moe import MoEForm, moe_sublayer

        std, residual = model.deviations(layer)
        form = MoEForm(
            d_model=model.d_model,
            router=self.router(model, layer),
            hidden=self.expert_size,
            std=residual if model.init_method in ("llama", "llama_depth") else std,
            std_down=self.expert_size**-0.5 if model.init_method == "fan_in" else residual,
            shared=self.shared_size,
            shared_mix=self.shared_mix,
            latent=self.latent_size,
            latent_norm=self.latent_norm,
            norm_eps=model.norm_eps,
            dispatch=self.dispatch,
        )
        return moe_sublayer(form)

    def router(self, model: Model, layer: int) -> RouterForm:
        """The router of block ``layer``."""
        from olmo_fn.nn.router import RouterForm

        return RouterForm(
            experts=self.num_experts,
            top_k=self.top_k,
            gating=self.gating,
            weight_norm=self.weight_norm,
            weight_scale=self.weight_scale,
            groups=self.expert_groups,
            top_groups=self.top_groups,
            jitter=self.jitter,
            place=layer,
            balance=self.balance_loss / model.n_layers,
            balance_over=self.balance_over,
            z=self.router_z_loss / model.n_layers,
            biased=self.balance_rate > 0,
            capacity_factor=self.capacity_factor,
            capacity_over=self.capacity_over,
        )

    def check(self, model: Model) -> None:
        """ValueError, in one line, if the numbers do not fit together."""
        check_positive(self, "num_experts", "top_k", "expert_size", "dense_size", "expert_groups", "top_groups")
        check_positive(self, "capacity_factor", "weight_norm", "weight_scale", above=0)
        E, k, groups, top = self.num_experts, self.top_k, self.expert_groups, self.top_groups
        if k > E:
            raise ValueError(f"--model.top-k is {k}, and there are {E} experts (--model.num-experts); choose {E} or fewer")
        if E % groups:
            raise ValueError(f"--model.expert-groups {groups} does not divide --model.num-experts {E}; choose {divisors(E)}")
        if top > groups:
            raise ValueError(f"--model.top-groups is {top}, and there are {groups} groups (--model.expert-groups)")
        if groups > 1 and k > top * (E // groups):
            raise ValueError(
                f"--model.top-k {k} experts are not in --model.top-groups {top} groups of {E // groups}; "
                f"choose {-(-k // (E // groups))} groups or more"
            )

    def check_experts(self, ep: int) -> None:
        """ValueError, with the arithmetic, if ``ep`` ranks cannot have equal numbers of experts."""
        if self.num_experts % ep:
            raise ValueError(
                f"--model.num-experts {self.num_experts} is not a multiple of --mesh.ep {ep}, whose ranks have equal numbers "
                f"of experts; choose --mesh.ep {divisors(self.num_experts)}"
            )
