"""How OLMo-core's ``config.json`` trains: optimizer, schedule, sizes of the batches, and data, as a config of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from olmo_fn.data.settings import Data
from olmo_fn.formats.groups import Group, at, shown
from olmo_fn.models.config import Model
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

HOW = ("_CLASS_", "type", "compile")
"""Fields that say how something is computed, not what."""
OF_OPTIMIZER = ("fixed_fields", "foreach", "fused", "dtype")
OF_TRAINING = (
    *("rank_microbatch_size", "compile_model", "state_dict_save_opts", "state_dict_load_opts"),
    *("load_key_mapping", "pp_config", "dp_config", "tp_config", "cp_config", "ep_config", "ac_config"),
)
OF_DATA = (
    *("_CLASS_", "type", "name", "tokenizer", "paths", "mix", "mix_base_dir", "expand_glob", "dtype", "metadata", "work_dir"),
    *(
        "include_instance_metadata",
        "ignore_fingerprint_mismatch",
        "sequence_length",
        "generate_doc_lengths",
        "label_mask_paths",
    ),
    *("global_batch_size", "seed", "num_threads", "num_workers", "prefetch_factor", "target_device_type"),
)
"""Fields of the data set and of its loader that are read, or change no number."""
SCHEDULES: dict[str, type[ScheduleSettings]] = {
    "ConstantScheduler": Constant,
    "ConstantWithWarmup": Constant,
    "CosWithWarmup": Cosine,
    "HalfCosWithWarmup": HalfCosine,
    "LinearWithWarmup": Linear,
    "InvSqrtWithWarmup": InvSqrt,
    "WSD": WSD,
    "WSDS": WSDS,
    "PowerLR": Power,
    "CosWithWarmupAndLinearDecay": CosineLinear,
}


def training(config: Mapping[str, Any], made: Model, names: Mapping[str, str], steps: int | None) -> Config:
    """The run that a config describes.

    ``names``: what OLMo-core calls each parameter, by its path here. ``steps``: how long the run is, if the trainer's state
    says so. ValueError with the field's path for what cannot be carried over.
    """
    module = Group(config.get("train_module", {"optim": config.get("optim")}), "train_module", HOW)
    optim, sigma = _optimizer(module.group("optim"), names)
    length = module.left.pop("max_sequence_length", at(config, "dataset", "sequence_length"))
    tokens = at(config, "data_loader", "global_batch_size")
    if type(length) is not int or type(tokens) is not int or length < 1 or tokens < 1 or tokens % length:
        raise ValueError(
            f"data_loader.global_batch_size is {shown(tokens)} and train_module.max_sequence_length {shown(length)}; "
            "they must be whole numbers of tokens, the first a multiple of the other"
        )
    if steps is None and at(config, "trainer", "max_duration", "unit") == "steps":
        steps = at(config, "trainer", "max_duration", "value")
    if type(steps) is not int or steps < 1:
        raise ValueError("neither the trainer's state nor trainer.max_duration says of how many steps the run is")
    schedule, steps = _schedule(module, optim.lr, steps)
    dtypes = at(config, "train_module", "dp_config", "param_dtype"), module.left.pop("autocast_precision", None)
    bfloat16 = "bfloat16" in (*dtypes, at(config, "model", "dtype"))
    recipe = Recipe(
        batch_size=tokens // length,
        sequence_length=length,
        clip=module.take("max_grad_norm", float, 0.0),
        skip_sigma=sigma,
        normalize=made.head.scales,
        dtype="bfloat16" if bfloat16 else "float32",
    )
    loss = CrossEntropy(z_loss=module.take("z_loss_multiplier", float, 0.0))
    module.one_of("label_ignore_index", -100)
    if "float8_config" in module.left and module.group("float8_config").left.get("enabled", True):
        raise ValueError("train_module.float8_config is enabled, and here is no float8")
    module.ignore(*OF_TRAINING)
    module.end()
    return Config(made, _data(config), loss=loss, optim=optim, schedule=schedule, recipe=recipe, run=Run(steps=steps))


def kind_of(fields: Group, kinds: Mapping[str, Any]) -> str:
    """Which of the classes ``kinds`` a group describes, by its class's name, or by the one that it is registered as."""
    given = str(fields.values.get("_CLASS_") or fields.values.get("type")).rpartition(".")[2]
    plain = {name.lower(): name for name in kinds}
    aliases = {"constant": "ConstantScheduler", "powerlr": "PowerLR", "skipstepadamw": "SkipStepAdamW"}
    short = given.removesuffix("Config").replace("_", "").lower()
    found = plain.get(short) or plain.get(aliases.get(short, "").lower())
    if found is None:
        raise ValueError(f"{fields.path} is a {given[:60]}; read are {', '.join(kinds)}")
    return found


def _optimizer(fields: Group, names: Mapping[str, str]) -> tuple[AdamW, float]:
    """AdamW's settings, and above how many deviations a step is skipped."""
    skips = kind_of(fields, {"AdamW": 0, "SkipStepAdamW": 0}) == "SkipStepAdamW"
    betas = fields.left.pop("betas", [0.9, 0.999])
    if not isinstance(betas, list) or [type(beta) for beta in betas] != [float, float]:
        raise ValueError(f"{fields.path}.betas is {shown(betas)}; it must be a list of two numbers")
    found = AdamW(
        lr=fields.take("lr", float, 1e-3),
        betas=(betas[0], betas[1]),
        eps=fields.take("eps", float, 1e-8),
        weight_decay=fields.take("weight_decay", float, 1e-2),
        first_step_bias=not fields.take("step_increment_bugfix", bool, True),
    )
    if not found.lr > 0:
        raise ValueError(f"{fields.path}.lr is {found.lr:g}; it must be positive")
    found = replace(found, no_decay=_no_decay(fields, found.weight_decay, names))
    sigma = 0.0
    if skips:
        fields.one_of("rolling_interval_length", 128)
        sigma = fields.take("sigma_factor", float, 6.0)
    fields.ignore(*OF_OPTIMIZER)
    fields.end()
    return found, sigma


def _no_decay(fields: Group, decay: float, names: Mapping[str, str]) -> tuple[str, ...]:
    """The paths of the parameters that a group of their own leaves without weight decay."""
    spared: set[str] = set()
    for i, value in enumerate(fields.take("group_overrides", list, [])):
        group = Group(value, f"{fields.path}.group_overrides[{i}]", HOW)
        patterns, options = group.take("params", list), group.group("opts")
        own = options.take("weight_decay", float, decay)
        if own not in (0.0, decay):
            raise ValueError(f"{options.path}.weight_decay is {own:g}; only 0 is read beside the {decay:g} of the others")
        options.end()
        group.end()
        if own != decay:
            spared |= {path for path, name in names.items() if any(fnmatchcase(name, str(pattern)) for pattern in patterns)}
    return tuple(path for path in names if path in spared)


def _schedule(module: Group, lr: float, steps: int) -> tuple[ScheduleSettings, int]:
    """The schedule, and of how many steps it is: OLMo-core's may be longer than the run."""
    if "scheduler" not in module.left:
        return Constant(warmup=0), steps
    fields = module.group("scheduler")
    kind = kind_of(fields, SCHEDULES)
    fields.one_of("lr_field", "lr")
    fields.one_of("initial_lr_field", "initial_lr")
    options: dict[str, Any] = {"units": fields.one_of("units", "steps", "tokens")}

    def length(name: str, default: float | None = None) -> int | float:
        """In steps or tokens, or a fraction: a float."""
        given = [fields.maybe(name, int), fields.maybe(f"{name}_steps", int), fields.maybe(f"{name}_fraction", float), default]
        found = next((value for value in given if value is not None), None)
        if found is None:
            raise ValueError(f"{fields.path} has neither {name} nor {name}_fraction")
        return found

    if kind == "ConstantScheduler":
        options["warmup"] = 0
    else:
        options |= {"warmup": length("warmup"), "warmup_from": fields.take("warmup_min_lr", float, 0.0) / lr}
    if kind in ("WSD", "WSDS", "PowerLR", "CosWithWarmupAndLinearDecay"):
        options |= {"decay": length("decay", 0.1), "final": fields.take("decay_min_lr", float, 0.0) / lr}
    elif not kind.startswith("Constant"):
        options["final"] = fields.take("alpha_f", float, 0.1)
    if kind == "PowerLR":
        options["exponent"] = fields.take("b", float, -0.51)
    if kind == "CosWithWarmupAndLinearDecay":
        options["floor"] = fields.take("alpha_f", float, 0.1)
    if kind == "WSDS":
        lengths, levels = fields.take("period_lengths", list), fields.take("period_lr_multipliers", list, [])
        if not all(type(n) is int for n in lengths) or not all(type(x) in (int, float) for x in levels):
            raise ValueError(f"{fields.path}: period_lengths must be whole numbers, and period_lr_multipliers numbers")
        options |= {"lengths": tuple(lengths), "levels": tuple(map(float, levels))}
    t_max = fields.maybe("t_max", int)
    fields.end()
    if t_max is not None and t_max != steps:
        if options["units"] != "steps" or t_max < steps:
            raise ValueError(f"{fields.path}.t_max is {t_max}, and the run has {steps} steps; only a longer one is read")
        steps = t_max
    return SCHEDULES[kind](**options), steps


def _data(config: Mapping[str, Any]) -> Data:
    """What the config says of the data: files, their order, documents."""
    dataset, found = config.get("dataset"), Data(heldout_fraction=0.0)
    if type(seed := at(config, "data_loader", "seed")) is int:
        found = replace(found, order="olmo-core", order_seed=seed)
    if not isinstance(dataset, dict):
        return found
    eos, dtype = at(dataset, "tokenizer", "eos_token_id"), dataset.get("dtype")
    return replace(
        found,
        paths=_texts(dataset.get("paths")),
        label_mask_paths=_texts(dataset.get("label_mask_paths")),
        eos_id=eos if type(eos) is int else None,
        mask_documents=dataset.get("generate_doc_lengths") is True,
        dtype=dtype if dtype in ("uint8", "uint16", "uint32", "uint64") else "auto",
    )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else ()


def lost(config: Mapping[str, Any]) -> list[str]:
    """What changes the batches of OLMo-core's run, and is not carried over: fields, and classes, by their dotted names.

    >>> lost({"dataset": {"_CLASS_": "x.NumpyPackedFSLDatasetConfig"}, "trainer": {"steps_to_skip": [{"start": 3}]}})
    ['dataset (NumpyPackedFSLDatasetConfig)', 'trainer.steps_to_skip']
    """
    found = []
    kinds = {"dataset": ("NumpyFSLDatasetConfig", "NumpyDatasetConfig"), "data_loader": ("NumpyDataLoaderConfig",)}
    for group, known in kinds.items():
        fields = config.get(group)
        fields = fields if isinstance(fields, dict) else {}
        kind = str(fields.get("_CLASS_", known[0])).rpartition(".")[2]
        if kind not in known or (group == "dataset" and fields.get("name", "fsl") != "fsl"):
            found.append(f"{group} ({kind[:60]})")
            continue
        length = fields.get("max_target_sequence_length")
        read = (*OF_DATA, "max_target_sequence_length") if length == fields.get("sequence_length") else OF_DATA
        found += [
            f"{group}.{name}" for name, value in fields.items() if name not in read and value is not None and value is not False
        ]
    if at(config, "trainer", "steps_to_skip"):
        found.append("trainer.steps_to_skip")
    callbacks = at(config, "trainer", "callbacks")
    for name, fields in callbacks.items() if isinstance(callbacks, dict) else ():
        kind = str(at(fields, "_CLASS_")).rpartition(".")[2]
        if ("Scheduler" in kind or "MonkeyPatcher" in kind) and at(fields, "enabled") is not False:
            found.append(f"trainer.callbacks.{name} ({kind[:60]})")
    return found
