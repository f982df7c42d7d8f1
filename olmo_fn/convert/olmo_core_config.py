"""OLMo-core's ``config.json`` as a config of this package. Every field is read, or known to change no number, or refused by name.

OLMo-core 2.x and 3.x are read: a block's attention is called ``attention`` until 2.4 and ``sequence_mixer`` since. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import isfinite
from typing import Any, TypeVar

from olmo_fn.data.settings import Data
from olmo_fn.models.config import Attention, Block, Model, PreNorm, SwiGLU
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.loss import CrossEntropy
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.schedules import (
    WSD,
    WSDS,
    Constant,
    Cosine,
    CosineLinear,
    HalfCosine,
    InvSqrt,
    Linear,
    Power,
    ScheduleSettings,
)

T = TypeVar("T")
SUPPORTED = "dense models of pre-norm or reordered-norm blocks, with QK-norm over all heads, SwiGLU, and RMS norms"
HOW = ("_CLASS_", "type", "dtype", "backend", "use_flash", "fused_ops", "loss_implementation", "full_precision")
"""Fields that say how something is computed, not what."""
OF_MODEL = ("compile", "dp_config", "tp_config", "cp_config", "ac_config", "float8_config")
OF_OPTIMIZER = ("compile", "fixed_fields", "foreach", "fused")
OF_TRAINING = (
    *("rank_microbatch_size", "compile_model", "autocast_precision", "state_dict_save_opts", "state_dict_load_opts"),
    *("load_key_mapping", "pp_config", "dp_config", "tp_config", "cp_config", "ep_config", "ac_config"),
)
PARAMS_ONLY = "; --params-only takes the model without it"


class Fields:
    """A group of a config, from which field after field is taken; ``path`` is its dotted name."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{path} is {_shown(value)}; it must be a group of fields")
        self.left, self.path = {key: item for key, item in value.items() if key not in HOW}, path
        self.kind = str(value.get("type") or str(value.get("_CLASS_", "")).rpartition(".")[2])

    def take(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A field that must be a ``kind``, or null and then ``default``; ValueError with its path for another, or for none."""
        value = self.left.pop(name, None)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)  # type: ignore[assignment]
        if type(value) is not kind or (kind is float and not isfinite(value)):  # type: ignore[arg-type]
            raise ValueError(f"{self.path}.{name} is {_shown(value)}; it must be a {kind.__name__}")
        return value

    def maybe(self, name: str, kind: type[T]) -> T | None:
        """A field that must be a ``kind`` or null."""
        return self.take(name, kind) if self.left.get(name) is not None else self.left.pop(name, None)

    def group(self, *names: str) -> Fields:
        """A field that is a group, by the first of its ``names`` that is there."""
        name = next((name for name in names if self.left.get(name) is not None), names[0])
        return Fields(self.left.pop(name, None), f"{self.path}.{name}")

    def only(self, name: str, *allowed: Any, hint: str = "") -> Any:
        """A field that may have just these values; the first is meant where it is null, if null is among them."""
        value = self.left.pop(name, None)
        if not any(value == item and type(value) is type(item) for item in allowed):
            shown = " or ".join(_shown(item) for item in allowed)
            raise ValueError(f"{self.path}.{name} is {_shown(value)}, and only {shown} is read{hint or f': {SUPPORTED}'}")
        return value

    def ignore(self, *names: str) -> None:
        """Fields that change no number of a run."""
        for name in names:
            self.left.pop(name, None)

    def end(self, hint: str = "") -> None:
        """ValueError that names a field which is set and was not taken."""
        for name, value in self.left.items():
            if value is not None and value is not False:
                raise ValueError(f"{self.path}.{name} is {_shown(value)}, which is not read, and would be lost{hint}")


def model(config: Mapping[str, Any]) -> Model:
    """The model that ``config["model"]`` describes; ValueError with the field's path for what this package has not.

    >>> norm = {"name": "rms", "eps": 1e-6, "bias": False}
    >>> attention = {"n_heads": 2, "bias": False, "qk_norm": norm, "rope": {"theta": 10_000}}
    >>> feed_forward = {"hidden_size": 24, "bias": False}
    >>> block = {"name": "reordered_norm", "attention": attention, "feed_forward": feed_forward, "layer_norm": norm}
    >>> head = {"layer_norm": norm, "bias": False}
    >>> found = model({"model": {"d_model": 16, "n_layers": 2, "vocab_size": 64, "block": block, "lm_head": head}})
    >>> found.block.mixer.rope_theta, found.block.feed_forward.hidden_size
    (10000.0, 24)
    """
    fields = Fields(config.get("model"), "model")
    fields.only("name", None, "default")
    n_layers = fields.take("n_layers", int)
    blocks = _blocks(fields, n_layers)
    eps = _agreed({eps for _, eps in blocks} | {_lm_head(fields.group("lm_head"))}, "eps of the norms")
    settings = [settings for settings, _ in blocks]
    alike = all(block == settings[0] for block in settings)
    init_method = fields.left.pop("init_method", None)
    found = Model(
        fields.take("d_model", int),
        n_layers,
        vocab_size=fields.take("vocab_size", int),
        block=settings[0],
        pattern=() if alike else tuple(settings),
        norm_eps=eps,
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        init_method=init_method if init_method in ("llama", "llama_depth", "normalized", "fan_in") else "normal",
        init_std=fields.take("init_std", float, 0.02),
    )
    fields.ignore("init_seed", "init_device", "embedding_init_std", *OF_MODEL)
    fields.end(f": {SUPPORTED}")
    found.check()
    return found


def _blocks(fields: Fields, n_layers: int) -> list[tuple[Block, float]]:
    """The block of each layer, and the eps of its norms."""
    if not 1 <= n_layers <= 1024:
        raise ValueError(f"model.n_layers is {n_layers}; it must be from 1 to 1024")
    pattern, overrides = fields.left.pop("block_pattern", None), fields.left.pop("block_overrides", None) or {}
    if pattern:
        kinds = fields.group("block")
        named = {name: _block(Fields(value, f"{kinds.path}.{name}")) for name, value in kinds.left.items()}
        if not isinstance(pattern, list) or not all(name in named for name in pattern):
            raise ValueError(f"model.block_pattern is {_shown(pattern)}; it must name blocks of model.block: {', '.join(named)}")
        found = [named[pattern[i % len(pattern)]] for i in range(n_layers)]
    else:
        found = [_block(fields.group("block"))] * n_layers
    for key, value in overrides.items() if isinstance(overrides, dict) else ():
        path = f"model.block_overrides.{key}"
        if not str(key).isdecimal() or int(key) >= n_layers:
            raise ValueError(f"{path}: there is no such layer; there are {n_layers}")
        found[int(key)] = _block(Fields(value, path))
    return found


def _block(fields: Fields) -> tuple[Block, float]:
    kind = fields.only("name", None, "default", "reordered_norm")
    mixer, qk_eps = _attention(fields.group("sequence_mixer", "attention"))
    feed_forward = fields.group("feed_forward")
    hidden = feed_forward.take("hidden_size", int)
    feed_forward.only("name", None, "default")
    feed_forward.only("bias", False)
    feed_forward.only("activation", None, "silu")
    feed_forward.end(f": {SUPPORTED}")
    eps = _agreed({_norm(fields.group("layer_norm")), qk_eps}, f"{fields.path}: eps of the norms")
    fields.only("dropout", None, 0, 0.0)
    fields.end(f": {SUPPORTED}")
    block = Block if kind == "reordered_norm" else PreNorm
    return block(mixer=mixer, feed_forward=SwiGLU(hidden_size=hidden)), eps


def _attention(fields: Fields) -> tuple[Attention, float]:
    if fields.kind and "ttention" not in fields.kind:
        raise ValueError(f"{fields.path} is a {fields.kind}, which is not read: {SUPPORTED}")
    fields.only("name", None, "default")
    fields.only("bias", False)
    fields.only("dropout", None, 0, 0.0)
    fields.ignore("use_recompute_qkv_prep")
    rope = fields.group("rope")
    rope.only("name", None, "default", "fused")
    theta = rope.take("theta", float, 500_000.0)
    rope.only("partial_rotary_factor", None, 1, 1.0)
    rope.end(f": {SUPPORTED}")
    eps = _norm(fields.group("qk_norm"))
    window: dict[str, Any] = {}
    if fields.left.get("sliding_window") is not None:
        sliding = fields.group("sliding_window")
        pattern = sliding.take("pattern", list)
        if not all(type(size) is int for size in pattern):
            raise ValueError(f"{sliding.path}.pattern is {_shown(pattern)}; it must be a list of whole numbers")
        window = {
            "window_pattern": tuple(pattern),
            "first_layer_full": sliding.take("force_full_attention_on_first_layer", bool, True),
            "last_layer_full": sliding.take("force_full_attention_on_last_layer", bool, True),
        }
        sliding.end(f": {SUPPORTED}")
    found = Attention(
        n_heads=fields.take("n_heads", int, 16),
        n_kv_heads=fields.maybe("n_kv_heads", int),
        head_dim=fields.maybe("head_dim", int),
        rope_theta=theta,
        **window,
    )
    fields.end(f": {SUPPORTED}")
    return found, eps


def _norm(fields: Fields) -> float:
    """The eps of an RMS norm with a gain and no bias."""
    fields.only("name", "rms", "fused_rms", "cute_rms")
    fields.only("elementwise_affine", None, True)
    fields.only("bias", False)
    eps = fields.take("eps", float, 1e-5)
    fields.end(f": {SUPPORTED}")
    return eps


def _lm_head(fields: Fields) -> float:
    fields.only("name", None, "default")
    fields.only("bias", False)
    eps = _norm(fields.group("layer_norm"))
    fields.end(f": {SUPPORTED}")
    return eps


def training(config: Mapping[str, Any], made: Model, names: Mapping[str, str], steps: int | None) -> Config:
    """The run that a config describes: optimizer, schedule, sizes of the batches, loss, and order of the data.

    ``names``: what OLMo-core calls each parameter, by its path here. ``steps``: how long the run is, if the trainer's state says
    so. ValueError with the field's path for what cannot be carried over.
    """
    module = Fields(config.get("train_module", {"optim": config.get("optim")}), "train_module")
    optim, extra = _optimizer(module.group("optim"), names)
    length = module.left.pop("max_sequence_length", None) or _at(config, "dataset", "sequence_length")
    tokens = _at(config, "data_loader", "global_batch_size")
    if type(length) is not int or type(tokens) is not int or length < 1 or tokens % length:
        raise ValueError(
            f"data_loader.global_batch_size is {_shown(tokens)} and train_module.max_sequence_length {_shown(length)}; "
            f"they must be whole numbers of tokens, one a multiple of the other{PARAMS_ONLY}"
        )
    duration = _at(config, "trainer", "max_duration")
    if steps is None and isinstance(duration, dict) and duration.get("unit") == "steps":
        steps = duration.get("value")
    if type(steps) is not int or steps < 1:
        raise ValueError(f"neither the trainer's state nor trainer.max_duration says of how many steps the run is{PARAMS_ONLY}")
    schedule, steps = _schedule(module, optim.lr, steps)
    recipe = Recipe(
        batch_size=tokens // length,
        sequence_length=length,
        clip=module.take("max_grad_norm", float, 0.0),
        skip_sigma=extra,
    )
    loss = CrossEntropy(z_loss=module.take("z_loss_multiplier", float, 0.0))
    module.only("label_ignore_index", None, -100, hint=PARAMS_ONLY)
    if (float8 := module.left.pop("float8_config", None)) and (not isinstance(float8, dict) or float8.get("enabled", True)):
        raise ValueError(f"train_module.float8_config is enabled, and olmo_fn computes in fp32 or bf16{PARAMS_ONLY}")
    module.ignore(*OF_TRAINING)
    module.end(PARAMS_ONLY)
    return Config(made, _data(config), loss=loss, optim=optim, schedule=schedule, recipe=recipe, run=Run(steps=steps))


def _optimizer(fields: Fields, names: Mapping[str, str]) -> tuple[AdamW, float]:
    """AdamW's settings, and at how many deviations a step is skipped."""
    kind = fields.kind.removesuffix("Config").replace("_", "").lower()
    if kind not in ("adamw", "skipstepadamw"):
        raise ValueError(f"{fields.path} is a {fields.kind or 'group without a type'}; AdamW and SkipStepAdamW are read{PARAMS_ONLY}")
    betas = fields.left.pop("betas", None) or [0.9, 0.999]
    if not isinstance(betas, list) or [type(beta) for beta in betas] != [float, float]:
        raise ValueError(f"{fields.path}.betas is {_shown(betas)}; it must be a list of two numbers{PARAMS_ONLY}")
    found = AdamW(
        lr=fields.take("lr", float, 1e-3),
        betas=(betas[0], betas[1]),
        eps=fields.take("eps", float, 1e-8),
        weight_decay=fields.take("weight_decay", float, 1e-2),
        first_step_bias=fields.take("step_increment_bugfix", bool, True) is False,
    )
    found = replace(found, no_decay=_no_decay(fields, found.weight_decay, names))
    sigma = 0.0
    if kind == "skipstepadamw":
        fields.only("rolling_interval_length", None, 128, hint=PARAMS_ONLY)
        sigma = float(fields.take("sigma_factor", int, 6))
    fields.ignore(*OF_OPTIMIZER)
    fields.end(PARAMS_ONLY)
    return found, sigma


def _no_decay(fields: Fields, decay: float, names: Mapping[str, str]) -> tuple[str, ...]:
    """The paths that the groups of parameters leave without weight decay."""
    groups, spared = fields.left.pop("group_overrides", None) or [], set()
    for i, value in enumerate(groups if isinstance(groups, list) else [groups]):
        group = Fields(value, f"{fields.path}.group_overrides[{i}]")
        patterns, options = group.take("params", list), group.group("opts")
        own = options.take("weight_decay", float, decay)
        if own not in (0.0, decay):
            raise ValueError(f"{options.path}.weight_decay is {own}, and others have {decay}; only 0 is read beside it{PARAMS_ONLY}")
        options.end(PARAMS_ONLY)
        if own != decay:
            spared |= {path for path, name in names.items() if any(fnmatchcase(name, str(pattern)) for pattern in patterns)}
    return tuple(path for path in names if path in spared)


def _schedule(module: Fields, lr: float, steps: int) -> tuple[ScheduleSettings, int]:
    """The schedule, and for how many steps: those that it is made for, where it is longer than the run."""
    if module.left.get("scheduler") is None:
        return Constant(warmup=0), steps
    s = module.group("scheduler")
    kind = s.kind.replace("_", "").lower()
    if kind not in SCHEDULES:
        raise ValueError(f"{s.path} is a {s.kind or 'group without a type'}; read are {', '.join(SCHEDULES.values())}{PARAMS_ONLY}")
    s.only("lr_field", None, "lr", hint=PARAMS_ONLY)
    s.ignore("initial_lr_field")
    units = s.only("units", None, "steps", "tokens", hint=PARAMS_ONLY) or "steps"
    shared: dict[str, Any] = {"units": units}

    def length(name: str, default: float | None = None) -> int | float:
        whole, fraction = s.maybe(name, int), s.maybe(f"{name}_fraction", float)
        old = s.maybe(f"{name}_steps", int)
        found = whole if whole is not None else old if old is not None else fraction if fraction is not None else default
        if found is None:
            raise ValueError(f"{s.path} has neither {name} nor {name}_fraction{PARAMS_ONLY}")
        return found

    def share(name: str) -> float:
        return s.take(name, float, 0.0) / lr

    if kind == "constantscheduler":
        made: ScheduleSettings = Constant(warmup=0, **shared)
    else:
        shared |= {"warmup": length("warmup"), "warmup_from": share("warmup_min_lr")}
        made = _warmed(kind, s, shared, length, share)
    t_max = s.maybe("t_max", int)
    s.end(PARAMS_ONLY)
    if t_max is not None and t_max != steps:
        if units != "steps" or t_max < steps:
            raise ValueError(f"{s.path}.t_max is {t_max}, and the run has {steps} steps; only a longer one is read{PARAMS_ONLY}")
        steps = t_max
    return made, steps


def _warmed(kind: str, s: Fields, shared: dict[str, Any], length: Callable[..., Any], share: Callable[[str], float]) -> ScheduleSettings:
    if kind == "constantwithwarmup":
        return Constant(**shared)
    if kind in ("wsd", "powerlr", "coswithwarmupandlineardecay", "wsds"):
        shared |= {"decay": length("decay", 0.1), "final": share("decay_min_lr")}
    match kind:
        case "wsd":
            return WSD(**shared)
        case "powerlr":
            return Power(exponent=s.take("b", float, -0.51), **shared)
        case "wsds":
            lengths, levels = s.take("period_lengths", list), s.left.pop("period_lr_multipliers", None) or []
            return WSDS(lengths=tuple(lengths), levels=tuple(levels), **shared)
        case "coswithwarmupandlineardecay":
            return CosineLinear(floor=s.take("alpha_f", float, 0.1), **shared)
    simple = {"coswithwarmup": Cosine, "halfcoswithwarmup": HalfCosine, "linearwithwarmup": Linear, "invsqrtwithwarmup": InvSqrt}
    return simple[kind](final=s.take("alpha_f", float, 0.1), **shared)


SCHEDULES = {
    name.lower(): name
    for name in (
        *("ConstantScheduler", "ConstantWithWarmup", "CosWithWarmup", "HalfCosWithWarmup", "LinearWithWarmup"),
        *("InvSqrtWithWarmup", "WSD", "WSDS", "PowerLR", "CosWithWarmupAndLinearDecay"),
    )
}


def _data(config: Mapping[str, Any]) -> Data:
    """What the config says of the data: its files, their order, and the end of a document."""
    dataset, found = config.get("dataset"), Data(heldout_fraction=0.0)
    if isinstance(seed := _at(config, "data_loader", "seed"), int):
        found = replace(found, order_seed=seed)
    if not isinstance(dataset, dict):
        return found
    paths, eos = dataset.get("paths"), _at(dataset, "tokenizer", "eos_token_id")
    if isinstance(paths, list) and all(isinstance(path, str) for path in paths):
        found = replace(found, paths=tuple(paths))
    return replace(
        found,
        eos_id=eos if isinstance(eos, int) else None,
        mask_documents=dataset.get("generate_doc_lengths") is True,
        dtype=dataset["dtype"] if dataset.get("dtype") in ("uint8", "uint16", "uint32", "uint64") else "auto",
    )


def _at(value: Any, *path: str) -> Any:
    """A nested value; None where there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _agreed(values: set[float], what: str) -> float:
    if len(values) > 1:
        raise ValueError(f"model: the {what} is {' and '.join(f'{value:g}' for value in sorted(values))}; olmo_fn has one")
    return values.pop()


def _shown(value: Any) -> str:
    """A value of JSON in a message: short, and never one that is deeply nested."""
    if isinstance(value, (list, dict)):
        return f"a {'list' if isinstance(value, list) else 'group'} of {len(value)}"
    return "null" if value is None else repr(value)[:60]
