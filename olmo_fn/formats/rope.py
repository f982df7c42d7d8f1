"""Rotary positions in a config.json: ``rope_parameters`` of transformers 5, ``rope_theta`` and ``rope_scaling`` of 4.

Both forms are written, so that no program takes its default in silence; where both are read, they must say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any, NamedTuple

from olmo_fn.formats.keys import Keys
from olmo_fn.models.config import Model
from olmo_fn.models.settings.rope_scaling import AdjustedBase, Interpolation, NoScaling, RopeScaling, Stepwise, YaRN

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = "default, linear, llama3 and yarn"


class Rotation(NamedTuple):
    """The base of rotary frequencies, and how they are stretched."""

    theta: float
    scaling: RopeScaling = NoScaling()


def one_rope(keys: Keys, default: float = 10_000.0) -> Rotation:
    """The rotation of all layers; ``default``: the base where no key says it."""
    keys.must_be("partial_rotary_factor", 1.0)
    new = keys.object("rope_parameters")
    if new.keys() & {FULL, SLIDING}:
        raise keys.refused("rope_parameters", "layers of this architecture have one rotation, not one for each type")
    old = old_form(keys, default)
    return agreed(keys, rotation(keys, new, "rope_parameters", default) if new else None, old) or Rotation(default)


def part_rope(keys: Keys, fraction: float, of_images: Sequence[str] = ()) -> tuple[Rotation, float]:
    """The rotation of all layers, and which part of each head has it; ``fraction`` where no key says that, and ``of_images``
    are fields of ``rope_parameters`` that change nothing of texts. In ``rope_parameters`` the part has precedence.
    """
    new = {name: value for name, value in keys.object("rope_parameters").items() if name not in of_images}
    inside, outside = new.pop("partial_rotary_factor", None), keys.get("partial_rotary_factor", fraction)
    part, where = (outside, "partial_rotary_factor") if inside is None else (inside, "rope_parameters")
    if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
        raise keys.refused(where, "partial_rotary_factor must be above 0 and at most 1")
    theta = keys.number("rope_theta", 10_000.0)
    found = agreed(keys, rotation(keys, new, "rope_parameters", theta) if new else None, old_form(keys, theta))
    return found or Rotation(theta), float(part)


def ropes_by_layer_type(keys: Keys, windows: Sequence[int | None]) -> tuple[Rotation, Rotation]:
    """The rotations of the layers with full attention, and of those with a window.

    Gemma 3 has a base for each (``rope_local_base_freq``). OLMo 3 has one, which transformers 4 and 5 read differently.
    """
    keys.must_be("partial_rotary_factor", 1.0)
    gemma = keys.get("model_type") == "gemma3_text"
    defaults = (1_000_000.0, 10_000.0) if gemma else (500_000.0, 500_000.0)
    new = keys.object("rope_parameters")
    full, sliding = (
        rotation(keys, new[kind], f"rope_parameters.{kind}", default) if new.get(kind) else None
        for kind, default in zip((FULL, SLIDING), defaults, strict=True)
    )
    if new and not full and not sliding:
        raise keys.refused(
            "rope_parameters", f"layers of this architecture have one rotation for each type, {FULL} and {SLIDING}"
        )
    old = old_form(keys, defaults[0])
    local = Rotation(keys.number("rope_local_base_freq")) if gemma and keys.get("rope_local_base_freq") else None
    if old and not gemma:
        local = Rotation(old.theta)
        if not new and old.theta != defaults[0] and any(windows):
            raise keys.refused(
                "rope_theta",
                "transformers 4 takes it for all layers, 5 for those with full attention alone; say which by rope_parameters",
            )
    full, sliding = agreed(keys, full, old), agreed(keys, sliding, local)
    return full or Rotation(defaults[0]), sliding or Rotation(defaults[1])


def old_form(keys: Keys, default: float) -> Rotation | None:
    """What ``rope_theta`` and ``rope_scaling`` say."""
    theta, scaling = keys.get("rope_theta"), keys.object("rope_scaling")
    if theta is None and not scaling:
        return None
    theta = default if theta is None else keys.number("rope_theta")
    return rotation(keys, {**scaling, "rope_theta": theta}, "rope_scaling", theta)


def agreed(keys: Keys, new: Rotation | None, old: Rotation | None) -> Rotation | None:
    """What both forms say."""
    if new and old and new != old:
        raise keys.refused("rope_parameters", f"rope_theta and rope_scaling say {old}, and it says {new}; keep one of them")
    return new or old


def rotation(keys: Keys, values: Any, where: str, default: float) -> Rotation:
    """A rotation from its JSON object."""
    if not isinstance(values, dict):
        raise ValueError(f"{keys.where}: {where} is {values!r}; it must be an object")
    inner = Keys(values, f"{keys.where}, {where}")
    kind = inner.get("rope_type", inner.get("type", "default"))
    if not isinstance(kind, str) or kind not in READ:
        raise ValueError(f"{keys.where}: {where} is of rope_type {kind!r}; there are {KINDS}")
    theta = inner.number("rope_theta", default)
    inner.must_be("partial_rotary_factor", 1.0)
    scaling = READ[kind](inner, keys)
    for name in sorted(inner.left):
        raise inner.refused(name, "it is not known here, and would be ignored")
    return Rotation(theta, scaling)


def read_yarn(inner: Keys, keys: Keys) -> YaRN:
    """YaRN with the defaults of transformers."""
    inner.must_be("truncate", True)
    inner.must_be("mscale", None)
    inner.must_be("mscale_all_dim", None)
    factor = inner.number("factor")
    return YaRN(
        factor=factor,
        beta_fast=inner.number("beta_fast", 32.0),
        beta_slow=inner.number("beta_slow", 1.0),
        old_context=inner.whole("original_max_position_embeddings", keys.get("max_position_embeddings")),
        attention_factor=inner.number("attention_factor", 0.1 * log(factor) + 1),
    )


def read_llama3(inner: Keys, keys: Keys) -> Stepwise:
    """The stepwise scaling."""
    return Stepwise(
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        old_context=inner.whole("original_max_position_embeddings", keys.get("max_position_embeddings")),
    )


READ: dict[str, Any] = {
    "default": lambda inner, keys: NoScaling(),
    "linear": lambda inner, keys: Interpolation(factor=inner.number("factor")),
    "llama3": read_llama3,
    "yarn": read_yarn,
}


def rope_json(m: Model) -> dict[str, Any]:
    """The keys of both forms, of an architecture with one rotation."""
    theta, scaled, full = full_json(m)
    return {"rope_theta": theta, "rope_scaling": scaled or None, "rope_parameters": full}


def ropes_json(m: Model, local_key: str = "") -> dict[str, Any]:
    """The keys of both forms, of an architecture with another rotation for layers with a window; the old form has its base
    under ``local_key``, and where it has no such key, and the bases are not the same, is left out.
    """
    theta, scaled, full = full_json(m)
    mixer = m.layers[0].mixer
    local = theta if mixer.local_rope_theta is None else mixer.local_rope_theta
    new = {"rope_parameters": {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": local}}}
    if not local_key and local != theta:
        return new
    return new | {"rope_theta": theta, "rope_scaling": scaled or None} | ({local_key: local} if local_key else {})


def full_json(m: Model) -> tuple[float, dict[str, Any], dict[str, Any]]:
    """Base, scaling and both of the layers with full attention."""
    mixer = m.layers[0].mixer
    scaled = scaling_json(mixer.rope_scaling)
    theta = mixer.rope_scaling.new_theta if isinstance(mixer.rope_scaling, AdjustedBase) else mixer.rope_theta
    return theta, scaled, {"rope_type": "default", **scaled, "rope_theta": theta}


def scaling_json(scaling: RopeScaling) -> dict[str, Any]:
    """A scaling without its base; empty where there is none."""
    match scaling:
        case Interpolation():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Stepwise():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.old_context,
            }
        case YaRN():
            factor = 0.1 * log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "original_max_position_embeddings": scaling.old_context,
                "attention_factor": factor,
            }
    return {}
