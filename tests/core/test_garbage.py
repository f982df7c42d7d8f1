"""A step leaves nothing behind that only Python's search for circles would free: on GPUs that runs every 100th step."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from olmo_fn.models.config import Model, dense
from olmo_fn.models.settings.moe import MoE
from olmo_fn.spec import init
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.recipe import parameters, recipe

DENSE = dense(32, 2, 2, 32, vocab_size=64)


def of_experts(**settings) -> Model:
    experts = MoE(num_experts=4, top_k=2, expert_size=16, shared_size=16, **settings)
    return replace(DENSE, block=replace(DENSE.block, feed_forward=experts))


STEPS = {
    "dense": (DENSE, {}),
    "remat": (DENSE, {"remat": "full"}),
    "selective remat": (DENSE, {"remat": "selective"}),
    "float8": (DENSE, {"float8": "rowwise"}),
    "experts": (of_experts(balance_rate=0.1), {}),
    "experts with a capacity, remat": (of_experts(capacity_factor=1.0), {"remat": "full"}),
}


@pytest.mark.parametrize(("model", "how"), STEPS.values(), ids=STEPS)
def test_a_step_leaves_no_tensor_to_the_garbage_collector(model: Model, how: dict) -> None:
    cfg = Config(model, recipe=Recipe(2, 16, compile=False, accumulate=2, **how), run=Run(steps=5000))
    step = recipe(cfg, torch.bfloat16)
    state = step.init(init(parameters(cfg), 0))
    ids = torch.arange(32).view(2, 16)
    batch = {"input_ids": ids, "labels": ids + 1}
    state, _ = step(state, batch)  # what is made once, such as classes
    gc.collect()
    gc.disable()
    try:
        state, _ = step(state, batch)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = [tuple(x.shape) for x in gc.garbage if isinstance(x, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not found
