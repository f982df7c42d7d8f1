"""Settings of Gated DeltaNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from olmo_fn.fields import INVISIBLE, POSITIVE, Range
from olmo_fn.models.settings.sublayer import WIDTH, MixerSettings, check_positive, divisors

if TYPE_CHECKING:
    from olmo_fn.models.config import Model
    from olmo_fn.nn.sublayer import Sublayer


@dataclass(frozen=True, kw_only=True)
class GatedDelta(MixerSettings):
    """Gated DeltaNet: a recurrence whose state does not grow with the sequence (OLMo-hybrid, Qwen 3.5)."""

    name: tyro.conf.Suppress[Literal["gated-delta"]] = "gated-delta"
    n_heads: Annotated[int, WIDTH] = 16
    """Heads of queries and keys."""
    n_value_heads: Annotated[int | None, WIDTH] = None
    """Heads of values, a multiple of the others; as many as them when not given."""
    head_dim: Annotated[int | None, WIDTH] = None
    """Width of a query and of a key; d_model / n_heads when not given."""
    value_head_dim: Annotated[int | None, WIDTH] = None
    """Width of a value; twice that of a key when not given."""
    conv_size: Annotated[int, Range(1, 64)] = 4
    """Positions that the short convolution sees, itself included."""
    negative_eigenvalues: bool = True
    """Steps of up to twice the error, so that a state can also change its sign (OLMo-hybrid)."""
    gate_norm_eps: Annotated[float, POSITIVE] = 1e-5
    """Added to the mean square in the norm of each head's result."""
    rule: Annotated[Literal["auto", "chunked", "fla"], INVISIBLE] = "auto"
    """What computes the rule: products of torch, or the kernels of fla-core; auto: these where they are installed, on a GPU."""

    @property
    def value_heads(self) -> int:
        """Heads of values."""
        return self.n_heads if self.n_value_heads is None else self.n_value_heads

    def width(self, d_model: int) -> int:
        """Width of a query and of a key."""
        return d_model // self.n_heads if self.head_dim is None else self.head_dim

    def value_width(self, d_model: int) -> int:
        """Width of a value."""
        return 2 * self.width(d_model) if self.value_head_dim is None else self.value_head_dim

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``."""
        from olmo_fn.nn.gated_delta import GatedDeltaForm, gated_delta_sublayer

        std, residual = model.deviations(layer)
        values = self.value_heads * self.value_width(model.d_model)
        form = GatedDeltaForm(
            d_model=model.d_model,
            key_heads=self.n_heads,
            value_heads=self.value_heads,
            key_dim=self.width(model.d_model),
            value_dim=self.value_width(model.d_model),
            conv_size=self.conv_size,
            negative=self.negative_eigenvalues,
            eps=self.gate_norm_eps,
            std=std,
            std_out=values**-0.5 if model.init_method == "fan_in" else residual,
            rule=self.rule,
        )
        return gated_delta_sublayer(form)

    def check(self, model: Model) -> None:
        """ValueError, in one line with the fix, if the numbers do not fit together."""
        check_positive(self, "n_heads", "n_value_heads", "head_dim", "value_head_dim", "conv_size")
        check_positive(self, "gate_norm_eps", above=0)
        if self.rule not in ("auto", "chunked", "fla"):
            raise ValueError(f"--model.rule is {self.rule!r}; choose auto, chunked or fla")
        if self.head_dim is None and model.d_model % self.n_heads:
            raise ValueError(
                f"--model.n-heads {self.n_heads} does not divide --model.d-model {model.d_model}; "
                f"choose one of {divisors(model.d_model)}, or give --model.head-dim"
            )
        if self.value_heads % self.n_heads:
            raise ValueError(
                f"--model.n-value-heads {self.value_heads} is no multiple of --model.n-heads {self.n_heads}, and several "
                f"heads of values share one of keys; choose {self.n_heads}, or {2 * self.n_heads}"
            )

    def check_rule(self, device: Any, cp: int, *, once: bool) -> None:
        """ValueError if what is to compute the rule cannot do it on a device, by ``cp`` ranks, differentiated once or more."""
        import torch

        from olmo_fn.kernels.gated_delta_fla import choose_rule

        choose_rule(self.rule, torch.empty(0, device=device), cp, once)

    def check_mesh(self, model: Model, tp: int, cp: int, cp_method: str) -> None:
        """ValueError, with the flags and a way out, if ranks of these degrees cannot share the heads."""
        if self.n_heads % tp:
            raise ValueError(
                f"--mesh.tp {tp} does not divide --model.n-heads {self.n_heads}, and a head stays on one rank; "
                f"choose --mesh.tp {divisors(self.n_heads)}"
            )
