"""The table of optimizers that the laws hold for, the parameters that they are tried on, and how a step of one is made."""

from __future__ import annotations

from functools import cache, partial

import torch

from olmo_fn import tree
from olmo_fn.core.compile import _of_plain_tensors
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.optim import adafactor, dion, lion, normuon, partition, sgd, soap
from olmo_fn.optim.adamw import adam, adamw
from olmo_fn.optim.base import Decay
from olmo_fn.optim.muon import JORDAN, muon
from olmo_fn.optim.schedule_free import schedule_free_adamw
from olmo_fn.spec import Init, Spec, init

NORMAL = Init("normal", 1.0)
SPECS = {
    "embed": Spec((5, 4), ("vocab", "embed"), NORMAL),
    "blocks": {
        "0": {
            "w": Spec((4, 3), ("embed", "mlp"), NORMAL),
            "experts": Spec((2, 3, 4), ("experts", "mlp", "embed"), NORMAL),
            "norm": Spec((3,), ("mlp",), Init("ones")),
        }
    },
    "gain": Spec((2,), ("mlp",), Init("ones")),
}


def beside(transform):
    """An optimizer of matrices with AdamW beside it."""
    return lambda lr, specs=SPECS, **o: partition({"matrix": transform(lr, **o), "default": adamw(lr, **o)}, specs)


MATRIX = {
    "muon": partial(muon, dtype=torch.float32),
    "muon jordan": partial(muon, iteration=JORDAN, scale="original", moments=torch.bfloat16),
    "normuon": partial(normuon, dtype=torch.float32),
    "dion": dion,
    "dion half": partial(dion, rank=0.5),
    "soap": partial(soap, every=2, eps=1e-4),
    "soap one side": partial(soap, every=2, max_dim=3, eps=1e-4),
}
WHOLE = {
    "adam": lambda lr, weight_decay=0.0, **o: adam(lr, **o),
    "adamw": adamw,
    "adamw bf16": partial(adamw, moments=torch.bfloat16),
    "adamw cautious": partial(adamw, weight_decay=Decay(0.1, (), True)),
    "sgd": sgd,
    "momentum": partial(sgd, momentum=0.9),
    "nesterov": partial(sgd, momentum=0.9, nesterov=True, weight_decay=0.1),
    "lion": lion,
    "adafactor": adafactor,
    "schedule-free": schedule_free_adamw,
}
OPTIMIZERS = {
    **{name: lambda lr, specs=SPECS, f=f, **o: f(lr, **o) for name, f in WHOLE.items()},
    **{name: beside(f) for name, f in MATRIX.items()},
}


def exact(name):
    """Rounding to bf16 turns a last bit into a visible one."""
    return "jordan" not in name and "bf16" not in name


def step_of(transform, *more):
    """A step whose gradients are given to ``update``."""
    return pipe(lambda params, batch: None, grad(engine="func"), transform, *more)


def gradients(seed, dtype=torch.float32):
    return init(SPECS, seed + 100, dtype)


def metrics(loss=1.0, norm=1.0):
    return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}


def shapes(state):
    return {path: (x.shape, x.dtype) for path, x in tree.items(state._asdict())}


def wrap_with(backend):
    """What `compile` puts around updates, with another backend."""
    one = partial(torch.compile, fullgraph=True, dynamic=True, isolate_recompiles=True, backend=backend)
    return cache(lambda fn: _of_plain_tensors(one(fn)))


def flat_pairs(a, b):
    b = tree.flatten(b.params)
    return [(x.double(), b[path].double()) for path, x in tree.items(a.params)]
