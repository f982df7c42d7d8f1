"""Eight steps of training are OLMo-core's: masks, micro-batches, clipping, schedule, optimizer and all."""

import json
from pathlib import Path

import pytest
import torch
from convert import load
from safetensors.torch import load_file
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.chain import IGNORE
from olmo_fn.core.pipe import accumulate, clip, grad, pipe, skip_spikes
from olmo_fn.data.loader import labels_of
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.nn.rope import rope_table
from olmo_fn.optim import adamw
from olmo_fn.optim.base import OLMO_CORE_NO_DECAY, Decay
from olmo_fn.optim.schedules import warmup_cosine

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

FOLDER = Path(__file__).parents[1] / "fixtures" / "train"
FACTS = json.loads((FOLDER / "train.json").read_text())
RUN = FACTS["trajectory"]
TENSORS = load_file(FOLDER / "train.safetensors")
CFG = dense(32, 2, 4, 32, vocab_size=64, n_kv_heads=2)


def saved(prefix):
    """Parameters or gradients of the fixture as our tree."""
    found = {n.removeprefix(prefix): t for n, t in TENSORS.items() if n.startswith(prefix)}
    return load(found, transformer.specs(CFG), "olmo_core")


def batch(i):
    """Batch ``i``; OLMo-core divides by a whole sequence for every instance that it masks."""
    ids, instances = TENSORS["input_ids"][i], TENSORS["instance_mask"][i]
    labels = torch.from_numpy(labels_of(ids.numpy(), TENSORS["label_mask"][i].numpy()))
    labels[~instances] = IGNORE
    tokens = (labels != IGNORE).sum() + (~instances).sum() * ids.shape[1]
    return {"input_ids": ids, "labels": labels, "loss_tokens": tokens}


def recipe(engine, remat="none"):
    """The step of the fixture."""
    o, s = RUN["optimizer"], RUN["scheduler"]
    micro_batches = TENSORS["input_ids"].shape[1] // RUN["microbatch_instances"]
    assert micro_batches == 2
    return pipe(
        transformer.loss(CFG, z_loss=RUN["z_loss_multiplier"]),
        grad(engine, remat),
        accumulate(micro_batches),
        clip(RUN["max_grad_norm"]),
        adamw(
            warmup_cosine(o["lr"], s["warmup"], s["t_max"], s["alpha_f"]),
            tuple(o["betas"]),
            o["eps"],
            Decay(o["weight_decay"], OLMO_CORE_NO_DECAY),
        ),
        skip_spikes(o["sigma_factor"], o["rolling_interval_length"]),
    )


def test_the_batches_are_those_of_the_fixture():
    """The divisor of every step, with two masked instances in all."""
    assert [batch(i)["loss_tokens"].item() for i in range(8)] == RUN["per_step"]["loss_div_factor"]
    assert (~TENSORS["instance_mask"]).sum() == 2
    theirs, block = RUN["model"], RUN["model"]["block"]
    attention = block["sequence_mixer"]
    assert (theirs["d_model"], theirs["n_layers"], theirs["vocab_size"]) == (32, 2, 64)
    assert (attention["n_heads"], attention["n_kv_heads"], block["feed_forward"]["hidden_size"]) == (4, 2, 32)
    assert (attention["rope"]["theta"], block["layer_norm"]["eps"]) == (CFG.block.mixer.rope_theta, CFG.norm_eps)


@pytest.mark.parametrize(("engine", "remat"), [("tape", "none"), ("tape", "full"), ("func", "none")])
def test_trajectory(engine, remat):
    """Losses, gradient norms and rates of every step, then parameters and moments."""
    step = recipe(engine, remat)
    state = step.init(saved("param0."))
    for i in range(RUN["steps"]):
        state, metrics = step(state, batch(i))
        at = {name: values[i] for name, values in RUN["per_step"].items()}
        for ours, theirs in (("loss", "loss"), ("ce", "ce_loss"), ("z", "z_loss")):
            assert metrics[ours].item() == pytest.approx(at[theirs], rel=1e-5), (i, ours)
        assert metrics["grad_norm"].item() == pytest.approx(at["grad_norm"], rel=1e-4)
        assert metrics["lr"].item() == pytest.approx(at["lr"], rel=1e-12)
        assert metrics["skipped"].item() == at["skipped"]
    assert state.step == RUN["steps"]
    expected = saved("param8.")
    for path, p in tree.items(state.params):
        largest = tree.at(expected, path).abs().max().item()
        assert_close(p, tree.at(expected, path), rtol=1e-4, atol=1e-4 * largest, msg=lambda m, n=path: f"{n}: {m}")
    for slot, prefix in (("adamw_m", "exp_avg8."), ("adamw_v", "exp_avg_sq8.")):
        for path, name, turn in (
            ("embed", "embeddings.weight", lambda x: x),
            ("blocks.0.attention.w_q", "blocks.0.attention.w_q.weight", torch.t),
        ):
            theirs = turn(TENSORS[prefix + name])
            ours = tree.at(state.slots[slot], path)
            assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_rope_table():
    """Rows of a full-size table, far positions too; OLMo-core stores each angle for both halves of a head."""
    (table,) = (r for r in FACTS["rope"] if r["name"] == "plain_500k")
    cos, sin = rope_table(torch.tensor(table["positions"]), table["head_dim"], table["config"]["theta"])
    assert_close(torch.cat((cos, cos), -1), TENSORS["rope.plain_500k.cos"], rtol=0, atol=1e-5)
    assert_close(torch.cat((sin, sin), -1), TENSORS["rope.plain_500k.sin"], rtol=0, atol=1e-5)
