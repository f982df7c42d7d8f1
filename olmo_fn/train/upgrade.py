"""Config files of version 0.1, which had a flat model, one record for all optimizers, and one for all schedules.

Those that a run wrote have every field; those written by hand have some, and of these only a flat model is not as it is now.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from olmo_fn.fields import values
from olmo_fn.models.families import OLMO2
from olmo_fn.train.optimizers import OPTIMIZERS
from olmo_fn.train.schedules import SCHEDULES

OF_ALL_OPTIMIZERS = {"betas", "momentum", "nesterov", "rank", "adamw_lr"}  # each run of version 0.1 wrote all of them


def upgrade(value: Any) -> Any:
    """What a config.yaml of version 0.1 holds, as of this version; anything else as it is.

    >>> old = {"optim": {"name": "lion", "lr": 1e-4, **dict.fromkeys(OF_ALL_OPTIMIZERS)}, "recipe": {"z_loss": 0.0}}
    >>> new = upgrade({**old, "schedule": {"name": "cosine", "final": 0.1, "exponent": -0.51}, "model": {}})
    >>> new["optim"], new["schedule"], new["loss"]
    ({'name': 'lion', 'lr': 0.0001}, {'name': 'cosine', 'final': 0.1}, {'z_loss': 0.0})
    >>> upgrade({"model": {"d_model": 8, "n_heads": 2}})
    {'model': {'d_model': 8, 'block': {'mixer': {'n_heads': 2}}}}
    >>> upgrade({"data": {"order_seed": 0, "cache_dir": ""}})
    {'data': {'order_seed': 0, 'cache_dir': '', 'order': 'olmo-core'}}
    """
    if not isinstance(value, dict):
        return value
    value = _with_weights(value)
    value = {**value, "model": _nested(value["model"], OLMO2["olmo2-1m"])} if "model" in value else value
    data = value.get("data")
    if isinstance(data, dict) and data.keys() >= {"order_seed", "cache_dir"} and "order" not in data:  # a run wrote it
        value = {**value, "data": {**data, "order": "olmo-core"}}
    try:
        if not value["optim"].keys() >= OF_ALL_OPTIMIZERS:
            return value
        recipe = dict(value["recipe"])
        loss = {"z_loss": recipe.pop("z_loss")}
        optim, schedule = _of_one(value["optim"], OPTIMIZERS), _of_one(value["schedule"], SCHEDULES)
    except (TypeError, KeyError, AttributeError):  # not what a run wrote; it is refused by the name of the field
        return value
    return {**value, "optim": optim, "recipe": recipe, "schedule": schedule, "loss": loss}


def _with_weights(value: dict[str, Any]) -> dict[str, Any]:
    """``mesh.keep_gathered`` of versions before 0.3 is ``mesh.weights``.

    >>> _with_weights({"mesh": {"tp": 2, "keep_gathered": True}})
    {'mesh': {'tp': 2, 'weights': 'zero-2'}}
    """
    mesh = value.get("mesh")
    if not isinstance(mesh, dict) or "keep_gathered" not in mesh:
        return value
    rest = {name: x for name, x in mesh.items() if name != "keep_gathered"}
    return {**value, "mesh": {**rest, "weights": "zero-2" if mesh["keep_gathered"] else "zero-3"}}


def _of_one(record: dict[str, Any], classes: tuple[Any, ...]) -> dict[str, Any]:
    """The fields of the class that the record names, but those without a value."""
    cls = next((cls for cls in classes if cls.name == record["name"]), None)
    names = {field.name for field in fields(cls)} if cls else record.keys()
    return {key: value for key, value in record.items() if key in names and value is not None}


def _nested(record: Any, settings: Any) -> Any:
    """The fields of a flat model, each in the group in which ``settings`` have it; a model with a ``block`` as it is."""
    if not isinstance(record, dict) or "block" in record:
        return record
    groups = {field.path[-1]: field.path[:-1] for field in values(settings) if field.path[-1] != "name"}
    nested: dict[str, Any] = {}
    for name, value in record.items():
        group = nested
        for part in groups.get(name, ()):
            group = group.setdefault(part, {})
        group[name] = value
    return nested
