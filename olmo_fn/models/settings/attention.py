"""Settings of attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from olmo_fn.fields import POSITIVE, SIGNED, Range
from olmo_fn.models.settings.rope_scaling import NoScaling
from olmo_fn.models.settings.sublayer import WIDTH, MixerSettings, check_positive, divisors

if TYPE_CHECKING:
    from olmo_fn.models.config import Model
    from olmo_fn.nn.attention import AttentionForm
    from olmo_fn.nn.rope import Rope
    from olmo_fn.nn.sublayer import Sublayer


@dataclass(frozen=True, kw_only=True)
class Attention(MixerSettings):
    """Grouped-query attention with QK-norm over all heads, rotary positions and sliding windows, as in OLMo 2 and 3."""

    name: tyro.conf.Suppress[Literal["attention"]] = "attention"
    n_heads: Annotated[int, WIDTH] = 16
    """Query heads."""
    n_kv_heads: Annotated[int | None, WIDTH] = None
    """Key and value heads (grouped-query attention); as many as query heads when not given."""
    head_dim: Annotated[int | None, WIDTH] = None
    """Width of a head; d_model / n_heads when not given."""
    qk_norm: Literal["full", "head", "per-head", "unit", "none"] = "full"
    """RMS norm of queries and keys: over all heads (OLMo), of each head (Qwen 3, Gemma 3), the same with gains for each head;
    unit: all heads together have length 1 before their gains (nGPT as OLMo-core has it)."""
    zero_centred: bool = False
    """The gains of these norms are what is added to one (Gemma)."""
    attention_bias: bool = False
    """Biases in all four projections."""
    clip_qkv: Annotated[float | None, POSITIVE] = None
    """Clamp queries, keys and values to this size."""
    gate: Literal["none", "head", "element"] = "none"
    """Multiply the result by a sigmoid of the input: one for each head, or for each entry."""
    sinks: bool = False
    """A learned logit for each head that takes attention and gives nothing (gpt-oss)."""
    scalable_softmax: bool = False
    """Queries times a learned factor for each head and the logarithm of how many tokens they see (Nakanishi 2025)."""
    score_cap: Annotated[float | None, POSITIVE] = None
    """Scores are c tanh(score / c) (Gemma 2)."""
    score_scale: Annotated[float | None, POSITIVE] = None
    """What products of queries and keys are multiplied by; 1 / sqrt(head_dim) when not given."""
    rope_theta: Annotated[float, POSITIVE] = 500_000.0
    """Base of the rotary frequencies."""
    local_rope_theta: Annotated[float | None, POSITIVE] = None
    """Another base for the layers with a window (Gemma 3)."""
    rope_scaling: Any = field(default_factory=NoScaling)
    """How rotary positions are stretched over a longer context."""
    rope_scaled_layers: Literal["full", "all"] = "full"
    """Which layers that concerns: those without a window (OLMo 3), or all."""
    rope_layers: Literal["all", "windowed", "none"] = "all"
    """Layers with rotary positions; windowed: those with full attention have none."""
    rope_fraction: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Which part of each head is rotated; where that is an odd number of dims, one more (as in transformers)."""
    rope_interleaved: bool = False
    """Rotate pairs of neighbours (the complex form), not of both halves."""
    window_pattern: Annotated[tuple[int, ...], SIGNED] = ()
    """Sliding windows of the layers, repeated over the depth: tokens that a position sees, itself included; -1 sees all."""
    first_layer_full: bool = False
    """Give the first layer full attention and start the pattern at the second."""
    last_layer_full: bool = True
    """Give the last layer full attention."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    def width(self, d_model: int) -> int:
        """Width of a head."""
        return self.head_dim if self.head_dim is not None else d_model // self.n_heads

    def window(self, layer: int, n_layers: int) -> int | None:
        """The sliding window of a layer, or None where it sees everything before it.

        >>> [Attention(window_pattern=(4096, 4096, 4096, -1)).window(i, 5) for i in range(5)]
        [4096, 4096, 4096, None, None]
        """
        forced = (self.first_layer_full and layer == 0) or (self.last_layer_full and layer == n_layers - 1)
        if not self.window_pattern or forced:
            return None
        size = self.window_pattern[(layer - self.first_layer_full) % len(self.window_pattern)]
        return None if size == -1 else size

    def attend(self) -> Any:
        """What computes softmax attention: override it to bring another (`olmo_fn.kernels.attention_cp.AttendVJP`) than
        ``--recipe.attention`` chooses.
        """
        from olmo_fn.kernels.attention_table import attend_vjp

        return attend_vjp

    def rope(self, model: Model, layer: int) -> Rope | None:
        """The rotation of a layer's heads."""
        from olmo_fn.nn.rope import Rope

        windowed = self.window(layer, model.n_layers) is not None
        if self.rope_layers == "none" or (self.rope_layers == "windowed" and not windowed):
            return None
        theta = self.local_rope_theta if windowed and self.local_rope_theta is not None else self.rope_theta
        scaled = self.rope_scaling.name != "none" and (self.rope_scaled_layers == "all" or not windowed)
        dims = self.rotated(model.d_model)
        return Rope(dims, theta, self.rope_scaling if scaled else None, self.rope_interleaved)

    def rotated(self, d_model: int) -> int:
        """How many dims of a head are rotated."""
        return int(self.width(d_model) * self.rope_fraction)

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``."""
        from olmo_fn.nn.attention import attention_sublayer

        return attention_sublayer(self.form(model, layer))

    def form(self, model: Model, layer: int) -> AttentionForm:
        """The attention of block ``layer`` in numbers."""
        from olmo_fn.nn.attention import AttentionForm

        std, residual = model.deviations(layer)
        k = self.width(model.d_model)
        return AttentionForm(
            d_model=model.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.kv_heads,
            head_dim=k,
            window=self.window(layer, model.n_layers),
            rope=self.rope(model, layer),
            eps=model.norm_eps,
            std=std,
            std_out=(self.n_heads * k) ** -0.5 if model.init_method == "fan_in" else residual,
            qk_norm=self.qk_norm,
            zero_centred=self.zero_centred,
            bias=self.attention_bias,
            clip=self.clip_qkv,
            gate=self.gate,
            sinks=self.sinks,
            scalable_softmax=self.scalable_softmax,
            cap=self.score_cap,
            score_scale=self.score_scale,
            attend=self.attend(),
        )

    def check(self, model: Model) -> None:
        """ValueError, in one line with the fix, if the numbers do not fit together."""
        check_positive(self, "n_heads", "n_kv_heads", "head_dim")
        check_positive(self, "rope_theta", "local_rope_theta", "clip_qkv", "score_cap", "score_scale", above=0)
        self.rope_scaling.check()
        if self.head_dim is None and model.d_model % self.n_heads:
            raise ValueError(
                f"--model.n-heads {self.n_heads} does not divide --model.d-model {model.d_model}; "
                f"choose one of {divisors(model.d_model)}, or give --model.head-dim"
            )
        dims = self.rotated(model.d_model)
        if self.rope_layers != "none" and not 0 < dims + dims % 2 <= self.width(model.d_model):
            raise ValueError(
                f"the head width is {self.width(model.d_model)}, of which {dims} are rotated; rotary "
                "positions need an even number (--model.head-dim, --model.rope-fraction)"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"--model.n-kv-heads {self.kv_heads} does not divide --model.n-heads {self.n_heads}; "
                f"choose one of {divisors(self.n_heads)}"
            )
        for size in self.window_pattern:
            if size != -1 and size < 1:
                raise ValueError(f"--model.window-pattern has {size}; use sizes of at least 1, or -1 for full attention")

    def check_backend(self, name: str, model: Model, layer: int, *need: Any) -> None:
        """ValueError if the backend of that name cannot do what block ``layer`` needs (`AttentionForm.need`)."""
        from olmo_fn.kernels.attention_table import attend_vjp, choose

        form = self.form(model, layer)
        if form.attend is not attend_vjp:
            raise ValueError(f"--model.mixer.name {self.name} attends in a way of its own; leave out --recipe.attention")
        choose(name, form.need(*need))

    def check_mesh(self, model: Model, tp: int, cp: int, cp_method: str) -> None:
        """ValueError, with the flags and a way out, if ranks of these degrees cannot share the heads."""
        heads = {"--model.n-heads": self.n_heads, "--model.n-kv-heads": self.kv_heads}
        for name, count in heads.items():
            if count % tp:
                raise ValueError(
                    f"--mesh.tp {tp} does not divide {name} {count}, and a head stays on one rank; "
                    f"choose --mesh.tp {divisors(self.kv_heads)}"
                )
        if cp_method == "ulysses" and cp > 1 and self.kv_heads % (tp * cp):
            name, count = next((name, count) for name, count in heads.items() if count % (tp * cp))
            product = f"--mesh.cp {cp} x --mesh.tp {tp} = {tp * cp}" if tp > 1 else f"--mesh.cp {cp}"
            raise ValueError(
                f"{product} does not divide {name} {count}, and ulysses gives each rank whole heads; choose --mesh.cp "
                f"{divisors(self.kv_heads // tp)}, or the method gather or ring"
            )
