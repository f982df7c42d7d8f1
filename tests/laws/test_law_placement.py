"""Placement is a map: what is sharded, gathered, scattered and summed follows from where each dim lies, in any combination.

The experts here stay on their ranks while they are used, and tokens come to them: `Rules` that no dense model has (law 2). Then
`placements` itself, drawn: every parameter is covered, by the right number of copies (law 1).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
import tyro
from helpers import Broken, batch_of, same_bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import finest, meshes
from torch.distributed import FileStore

from olmo_fn import tree
from olmo_fn.checkpoint import Ranks, load, save
from olmo_fn.core.pipe import accumulate, clip, ema, grad, pipe, skip_spikes
from olmo_fn.core.step import Step
from olmo_fn.mesh.axis import Axis, chunk
from olmo_fn.mesh.collectives import all_gather, all_to_all, reduce_scatter
from olmo_fn.mesh.mesh import AXES, Mesh, members
from olmo_fn.mesh.placement import TENSOR, TOKENS, Placed, Rules, placements
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Block, FeedForwardSettings, Model
from olmo_fn.nn.sublayer import Sublayer
from olmo_fn.optim import adamw, partition
from olmo_fn.optim.muon import muon
from olmo_fn.parallel.shard import shard
from olmo_fn.parallel.sharded import sharded
from olmo_fn.spec import Init, Spec, init
from olmo_fn.testing import Layout, Pool, assert_equivalent


@dataclass(frozen=True)
class Experts(FeedForwardSettings):
    """Experts (Shazeer et al. 2017) that live on the ranks of an axis.

    ``exchange``: a token goes to the expert of its position, to the rank that has it and back, by all-to-all. Otherwise every
    expert sees every token, weighted by its gate: tokens of all ranks are gathered, and results summed.
    """

    name: tyro.conf.Suppress[str] = "experts"
    count: int = 4
    hidden: int = 3
    axis: str = "dp_shard"
    exchange: bool = True

    def build(self, model: Model, layer: int) -> Sublayer:
        def apply(p, x, ctx):
            axis: Axis = getattr(ctx.backend.axes, self.axis)
            gates = (x @ p["router"]).softmax(-1)
            to_experts = self._exchanged if self.exchange else self._everywhere
            return to_experts(axis, p, x.flatten(0, 1), gates.flatten(0, 1)).view(x.shape)

        specs = {
            "router": Spec((model.d_model, self.count), ("embed", "choice"), Init("normal", 0.5)),
            "w_in": Spec((self.count, model.d_model, self.hidden), ("experts", "embed", "hidden"), Init("normal", 0.5)),
            "w_out": Spec((self.count, self.hidden, model.d_model), ("experts", "hidden", "embed"), Init("normal", 0.5)),
        }
        return Sublayer("experts", specs, apply, lambda T: 4 * T * model.d_model * self.hidden, divided=("cp",))

    def _exchanged(self, axis, p, x, gates):
        """x (N, D), tokens of an expert E apart; as many for each, so that what is sent is even."""
        gate = gates.unflatten(0, (-1, self.count)).diagonal(dim1=1, dim2=2)  # (N/E, E)
        mine = all_to_all(x.unflatten(0, (-1, self.count)).transpose(0, 1), 0, 1, axis)  # (E/n, n N/E, D)
        back = all_to_all(torch.bmm(torch.bmm(mine, p["w_in"]).tanh(), p["w_out"]), 1, 0, axis)  # (E, N/E, D)
        return (back * gate.T[..., None]).transpose(0, 1).flatten(0, 1)

    def _everywhere(self, axis, p, x, gates):
        """Ranks may have different numbers of experts, or none."""
        first, many = chunk(self.count, axis.index, axis.size)
        x, gate = all_gather(x, 0, axis), all_gather(gates, 0, axis)[:, first : first + many]
        hidden = torch.einsum("nd,edf->enf", x, p["w_in"]).tanh()
        return reduce_scatter(torch.einsum("enf,efd,ne->nd", hidden, p["w_out"], gate), 0, axis)


def model_of(**experts) -> Model:
    mixer = Attention(n_heads=2, n_kv_heads=2, head_dim=2)
    return Model(6, 2, 11, block=Block(mixer=mixer, feed_forward=Experts(**experts)), init_std=0.3)


def over(axis: str, **more) -> Rules:
    """The usual rules, and experts over an axis."""
    return Rules({"embed": "fsdp", **TENSOR, "experts": axis}, {**TENSOR, "experts": axis}, **more)


def recipe(model: Model, optim: str = "adamw", engine: str = "tape", remat: str = "none", parts: int = 1) -> Step:
    optimizers = {
        "adamw": lambda: adamw(1e-2),
        "muon": lambda: partition(
            {"matrix": muon(1e-2, dtype=torch.float64), "default": adamw(1e-2)}, transformer.specs(model)
        ),
    }
    gradient = grad(engine, remat, torch.float64)
    return pipe(transformer.loss(model), gradient, accumulate(parts), clip(0.1), optimizers[optim](), skip_spikes(), ema(0.9))


def batches(n: int = 2):
    return [batch_of(11, rows=8, length=16, seed=seed, masked=(0.9, 0.0, 0.5, 0.2)) for seed in range(n)]


def same(pool, layout, model, **how):
    return assert_equivalent(partial(recipe, model, **how), transformer.specs(model), [layout], batches(), pool=pool)[0]


EXCHANGED, EVERYWHERE = model_of(), model_of(count=3, exchange=False)
LAYOUTS = {
    "exchanged": (EXCHANGED, Layout(Mesh(dp_shard=2), over("dp_shard"))),
    "exchanged, zero-2": (EXCHANGED, Layout(Mesh(dp_shard=2), over("dp_shard", keep_gathered=True))),
    "everywhere, uneven": (EVERYWHERE, Layout(Mesh(dp_shard=2), over("dp_shard"))),
    "everywhere, a rank without": (EVERYWHERE, Layout(Mesh(dp_shard=4), over("dp_shard"))),
    "replicated twice": (EXCHANGED, Layout(Mesh(dp_replicate=2, dp_shard=2), over("dp_shard"))),
    "the rest over cp": (EXCHANGED, Layout(Mesh(dp_shard=2, cp=2), over("dp_shard"))),
    "over cp, the rest over dp_shard": (model_of(axis="cp"), Layout(Mesh(dp_shard=2, cp=2), over("cp"))),
    "over cp alone": (model_of(axis="cp"), Layout(Mesh(cp=2), over("cp"))),
    "over both": (model_of(axis="fsdp"), Layout(Mesh(dp_shard=2, cp=2), over("fsdp"))),
    "over ep": (model_of(axis="ep"), Layout(Mesh(dp_shard=2, ep=2))),
    "over ep, the rest over dp_outer": (model_of(axis="ep"), Layout(Mesh(dp_shard=4, ep=2))),
    "over ep, the rest over cp": (model_of(axis="ep"), Layout(Mesh(dp_shard=2, cp=2, ep=2))),
    "over ep, uneven": (model_of(axis="ep", count=3, exchange=False), Layout(Mesh(dp_shard=2, ep=2))),
    "over ep, whole on tp": (model_of(axis="ep"), Layout(Mesh(dp_shard=2, tp=2, ep=2))),
    "no ep": (model_of(axis="ep"), Layout(Mesh(dp_shard=2))),
    "whole on tp": (EXCHANGED, Layout(Mesh(dp_shard=2, tp=2), over("dp_shard"))),
    "in a pipeline": (EXCHANGED, Layout(Mesh(pp=2, dp_shard=2), over("dp_shard"))),
    "nobody to exchange with": (EXCHANGED, Layout(Mesh(dp_replicate=2), over("dp_shard"))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_those_of_one_process(pool: Pool, name: str) -> None:
    model, layout = LAYOUTS[name]
    assert same(pool, layout, model) < 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "exchanged",
        "everywhere, uneven",
        "replicated twice",
        "the rest over cp",
        "over cp, the rest over dp_shard",
        "over ep, the rest over dp_outer",
        "over ep, the rest over cp",
    ],
)
def test_with_an_optimizer_of_whole_matrices(pool: Pool, name: str) -> None:
    model, layout = LAYOUTS[name]
    assert same(pool, layout, model, optim="muon") < 1e-10


@pytest.mark.parametrize("how", [{"engine": "func"}, {"remat": "full", "parts": 2}], ids=str)
def test_carried_out_otherwise(pool: Pool, how: dict) -> None:
    model, layout = LAYOUTS["exchanged"]
    assert same(pool, layout, model, **how) < 1e-12


# --- what it catches --------------------------------------------------------------------------------------------------


def also_over_what_shards_it(self, path):
    return [] if self.gather_axis(path).size > 1 else [self.axes.tokens]


def as_if_used_whole(self, mesh):
    return prod(mesh.degree(axis) for axis in AXES[1:]) // prod(mesh.degree(axis) for axis in self.gathered)


@pytest.mark.parametrize(
    ("target", "mutant"),
    [
        ("olmo_fn.parallel.sharded_placement.ShardedPlacement.sum_axes", also_over_what_shards_it),
        ("olmo_fn.mesh.placement.Placed.copies", as_if_used_whole),
    ],
    ids=["gradients summed over the ranks of other experts", "a norm that takes experts for copies"],
)
def test_a_wrong_map_is_caught(pool: Pool, target: str, mutant) -> None:
    model, layout = LAYOUTS["exchanged"]
    with pytest.raises(AssertionError, match=r"step 0, .* on rank \d differs by"):
        same(Broken(pool, target, mutant), layout, model)


# --- saved on one mesh, loaded on another -----------------------------------------------------------------------------


def train_and_save(connection, model, rules, optim, folder):
    step = pipe_sharded(connection, model, rules, optim)
    state = step.init(init(transformer.specs(model), 0, torch.float64))
    state, _ = step(state, batches()[0])
    store = FileStore(f"{folder}/store", connection.mesh.size)
    save(state._asdict(), folder, step=1, ranks=Ranks(connection.rank, connection.mesh.size, store))
    return tree.map(lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x, state._asdict())


def load_and_compare(connection, model, rules, optim, path, wanted):
    step = pipe_sharded(connection, model, rules, optim)
    like = step.init(init(transformer.specs(model), 1, torch.float64))._asdict()
    found, _ = load(path, like, select=[*tree.flatten(like)])
    whole = tree.map(lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x, found)
    return same_bits(whole, wanted)


def pipe_sharded(connection, model, rules, optim):
    return shard(connection, transformer.specs(model), rules)(recipe(model, optim))


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_checkpoint_of_two_ranks_is_one_of_any(pool: Pool, tmp_path: Path, optim: str) -> None:
    model, rules = EXCHANGED, over("dp_shard")
    wanted = pool.run(train_and_save, model, rules, optim, str(tmp_path), mesh=Mesh(dp_shard=2))[0]
    (path,) = tmp_path.glob("*1")
    alone, _ = load(path)
    assert same_bits(alone, wanted)
    for mesh in (Mesh(), Mesh(dp_shard=2, cp=2), Mesh(dp_shard=4, ep=2)):
        assert all(pool.run(load_and_compare, model, rules, optim, str(path), wanted, mesh=mesh))


# --- the map itself ---------------------------------------------------------------------------------------------------

LOGICAL = ("embed", "mlp", "heads", "experts", "free")


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Spec]:
    """Parameters of one to three dims, each dim of another logical axis."""
    found = {}
    for i in range(draw(st.integers(1, 4))):
        axes = draw(st.lists(st.sampled_from(LOGICAL), min_size=1, max_size=3, unique=True))
        shape = tuple(draw(st.integers(1, 7)) for _ in axes)
        found[f"w{i}"] = Spec(shape, tuple(axes), Init("zeros"))
    return found


@st.composite
def some_rules(draw: st.DrawFn) -> Rules:
    """Rules that may make no sense together: what is legal must be right, all else be refused by name."""
    store, use = dict(TENSOR), dict(TENSOR)
    if draw(st.booleans()):
        store["embed"] = draw(st.sampled_from(["fsdp", "dp_shard", "cp", "ep"]))
    axis = draw(st.sampled_from(["", "fsdp", "dp_shard", "cp", "ep"]))
    if axis:
        store["experts"] = axis
        if draw(st.booleans()):
            use["experts"] = axis
    return Rules(store, use)


@given(parameters(), some_rules(), meshes())
def test_every_parameter_is_covered_by_the_right_number_of_copies(specs: dict[str, Spec], rules: Rules, mesh: Mesh) -> None:
    """Boxes of all ranks tile each parameter, at rest and in use, and axes neither shard nor sum anything twice."""
    known = {axis for spec in specs.values() for axis in spec.axes}
    rules = Rules(*({n: a for n, a in t.items() if n in known or n in TENSOR} for t in (rules.store, rules.use)))
    try:
        placed = placements(specs, rules, mesh)
    except ValueError as error:
        refused = str(error).split(":")[0]
        if refused not in specs:
            raise
        return
    assert placed.keys() == specs.keys()
    stage = [finest(mesh, rank) for rank in range(mesh.size) if mesh.coordinates(rank)["pp"] == 0]
    for place in placed.values():
        sharding = [name for axis, _ in place.dims for name in members(axis)]
        assert len(sharding) == len(set(sharding)), "no axis shards two dims"
        assert {*place.used} <= {axis for axis, _ in place.dims}
        at_rest = Counter(cell for where in stage for cell in cells(place, mesh, where, ()))
        every = [*product(*map(range, place.shape))]
        assert at_rest == Counter(dict.fromkeys(every, place.copies(mesh)))
        in_use = Counter(cell for where in stage for cell in cells(place, mesh, where, place.gathered))
        assert in_use == Counter(dict.fromkeys(every, place.copies(mesh) * prod(mesh.degree(axis) for axis in place.gathered)))
        summed = {*place.summed} | {name for axis in place.gathered for name in members(axis)}
        used = {name for axis in place.used for name in members(axis)}
        assert summed | (used & {*TOKENS}) == {*TOKENS}, "summed over all ranks with other tokens that use the same"
        assert not summed & used
        assert not {*place.summed} & {*sharding}


def cells(place: Placed, mesh: Mesh, where: dict[str, int], gathered: tuple[str, ...]) -> product:
    """The entries that the rank at ``where`` has, once some axes are gathered."""
    box = place.box({axis: (0, 1) if axis in gathered else spot(mesh, where, axis) for axis, _ in place.dims})
    return product(*(range(s.start, s.stop) for s in box.slices))


def spot(mesh: Mesh, where: dict[str, int], axis: str) -> tuple[int, int]:
    """Index and size on an axis, a flattened one perhaps."""
    index = 0
    for name in members(axis):
        index = index * mesh.degree(name) + where[name]
    return index, mesh.degree(axis)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Rules({"embed": "pp"}), "a rule shards 'embed' over 'pp'; parameters are sharded over fsdp, tp, ep, dp_shard, cp"),
        (Rules({"layers": "dp_shard"}), "a rule names the logical axis 'layers'; the parameters have embed, mlp"),
        (
            Rules({"embed": "fsdp", "mlp": "fsdp"}, {}),
            "w: both 'embed' and 'mlp' are stored over 'fsdp'; give one of them another axis",
        ),
        (
            Rules({"embed": "fsdp"}, {"mlp": "tp"}),
            "w: 'mlp' is used over 'tp', but stored over None; store it as it is used",
        ),
        (
            Rules({"embed": "fsdp", "mlp": "dp_shard"}, {}),
            "w: both 'embed' and 'mlp' are stored over 'fsdp', which shares ranks with 'dp_shard'; give one of them another "
            "axis",
        ),
        (
            Rules({"embed": "cp", "mlp": "dp_shard"}, {}),
            "w: it is stored over 'cp' and 'dp_shard' and used over neither; leave one of them out",
        ),
        (Rules({"mlp": "tp"}, {}), "w: 'mlp' is stored over 'tp' and not used so; only 'fsdp' is gathered for use"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules: Rules, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        placements({"w": Spec((4, 6), ("embed", "mlp"), Init("zeros"))}, rules, Mesh(dp_shard=2))
    assert str(error.value) == message


def test_rules_must_shard_what_the_stages_share_over_tp() -> None:
    """A feed-forward network that every rank computes whole would be counted by each."""
    tables = ({"embed": "fsdp", **TENSOR}, dict(TENSOR))
    rules = Rules(*({name: axis for name, axis in table.items() if name != "mlp"} for table in tables))
    specs = {"w": Spec((4, 6), ("embed", "mlp"), Init("zeros"))}
    with pytest.raises(ValueError, match=r"--mesh.tp is 2, but the rules do not use 'mlp' over 'tp'"):
        placements(specs, rules, Mesh(tp=2))
    placements(specs, rules, Mesh(dp_shard=2))


def test_a_mesh_of_ranks_refuses_them_too(pool: Pool) -> None:
    pool.run(refuses, mesh=Mesh(dp_shard=2))


def refuses(connection):
    with pytest.raises(ValueError, match=r"^w: both"):
        sharded(connection, {"w": Spec((4, 6), ("embed", "mlp"), Init("zeros"))}, Rules({"embed": "fsdp", "mlp": "fsdp"}, {}))
