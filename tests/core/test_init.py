"""Initial values: OLMo-core's distributions, and a function of seed and path alone, by any rows."""

import json
import math
from pathlib import Path

import pytest
import torch
from convert import name
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from strategies import boxes, part_of

from olmo_fn import spec, tree
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.spec import TRUNCATION, Box, Init, Spec, _uniform, init, init_leaf

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "init" / "init.json").read_text())["cases"]
TRUNCATED_STD = 0.986579  # of a standard normal cut at three standard deviations


def model(case):
    """Our config of a case."""
    theirs = CASES[case]["config"]
    mixer = theirs["block"]["sequence_mixer"]
    return dense(
        theirs["d_model"],
        theirs["n_layers"],
        mixer["n_heads"],
        theirs["block"]["feed_forward"]["hidden_size"],
        vocab_size=theirs["vocab_size"],
        n_kv_heads=mixer.get("n_kv_heads"),
        tie_embeddings=theirs["tie_word_embeddings"],
        init_method=theirs["init_method"],
        init_std=theirs["init_std"],
    )


@pytest.mark.parametrize("case", CASES)
def test_olmo_core(case):
    """Mean, deviation and bounds of every parameter, for each method: one nominal std for theirs and ours."""
    cfg = model(case)
    specs, theirs = transformer.specs(cfg), dict(CASES[case]["params"])
    compared = 0
    for path, p in tree.items(init(specs, seed=1)):
        its = theirs.pop(name(path, "olmo_core"), None)
        if its is None:
            assert case == "dense_tied"  # made without query and key norms
            assert path.endswith(("q_norm", "k_norm"))
            continue
        nominal = tree.at(specs, path).init
        n = p.numel()
        assert its["n"] == n
        if nominal.kind == "ones":
            assert its["min"] == its["max"] == p.min() == p.max() == 1
            continue
        std = nominal.std * (TRUNCATED_STD if nominal.kind == "trunc_normal" else 1)
        for measured, mean in ((its["std"], its["mean"]), (p.std().item(), p.mean().item())):
            assert measured == pytest.approx(std, rel=5 / math.sqrt(2 * n)), path
            assert abs(mean) < 5 * std / math.sqrt(n), path
        largest = [max(-its["min"], its["max"]), p.abs().max().item()]
        if nominal.kind == "trunc_normal":
            assert max(largest) <= TRUNCATION * nominal.std * (1 + 1e-6)
        else:
            assert min(largest) > TRUNCATION * nominal.std  # not cut
        compared += 1
    assert compared == 1 + 7 * cfg.n_layers + (not cfg.tie_embeddings)
    assert all(".w_g." in left for left in theirs)  # the gates of theirs are not in our model


# --- a function of (seed, path) -----------------------------------------------------------------------


SPECS = transformer.specs(dense(16, 2, 2, 24, vocab_size=40, init_method="llama_depth"))


@examples(25)
@given(st.permutations(sorted(tree.flatten(SPECS))), st.integers(1, 10), st.integers(0, 2**63))
def test_independent_of_order_and_company(paths, n, seed):
    """A leaf is the same whichever others are made with it, and in whatever order."""
    whole = tree.flatten(init(SPECS, seed))
    flat = tree.flatten(SPECS)
    some = init(tree.unflatten((path, flat[path]) for path in paths[:n]), seed)
    for path, p in tree.items(some):
        assert torch.equal(p, whole[path])


kinds = st.sampled_from([Init("normal", 0.5), Init("trunc_normal", 2.0), Init("ones"), Init("zeros")])


@examples(100)
@given(st.data(), st.lists(st.integers(1, 13), min_size=1, max_size=3), kinds, st.integers(0, 9))
def test_a_part_is_a_part_of_the_whole(data, shape, kind, seed):
    """A part made alone equals the whole leaf's, bit for bit, wherever in a counter it begins."""
    leaf = Spec(tuple(shape), ("embed",) * len(shape), kind)
    box = data.draw(boxes(shape))
    found = init_leaf(leaf, seed, "blocks.0.w", box)
    assert found.shape == box[1]
    assert torch.equal(found, part_of(init_leaf(leaf, seed, "blocks.0.w"), box))


@examples(100)
@given(st.integers(0, 200), st.integers(0, 200))
def test_the_stream_is_the_same_from_any_place(start, n):
    """Drawing begins anywhere, inside a counter too."""
    assert torch.equal(_uniform(3, "w", start, start + n), _uniform(3, "w", 0, 400)[start : start + n])


def test_parts_over_the_border_of_a_block():
    """The library's own block, 2²² numbers: rows of odd length on both sides of its end."""
    rows, width = 2 * 1021, 4111
    assert rows * width > 2**23
    leaf = Spec((rows, width), ("vocab", "embed"), Init("trunc_normal", 0.02))
    whole = init_leaf(leaf, 0, "embed")
    border = 2**22 // width
    for start, many in ((border - 3, 5), (border, 1), (1, border + 1), (rows - 1, 1)):
        for box in (Box((start, 0), (many, width)), Box((start, 17), (many, 1000))):
            assert torch.equal(init_leaf(leaf, 0, "embed", box), part_of(whole, box))
    assert whole.isfinite().all()
    assert whole.abs().max() <= TRUNCATION * 0.02 * (1 + 1e-6)
    repeats = len(whole.view(-1)[:100_000].unique())
    assert repeats > 95_000  # 23 bits: a few coincide


@pytest.mark.parametrize("kind", ["normal", "trunc_normal"])
def test_distribution(kind):
    """Kolmogorov-Smirnov against the exact distribution, four moments, no infinity at the ends."""
    n = 500_000
    x = init_leaf(Spec((n,), ("embed",), Init(kind, 2.0)), 7, "w").double() / 2
    assert x.isfinite().all()
    tail = 0.5 * math.erfc(TRUNCATION / math.sqrt(2)) if kind == "trunc_normal" else 0.0
    cdf = (torch.special.ndtr(x.sort().values) - tail) / (1 - 2 * tail)
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 1.95 / math.sqrt(n)  # exceeded once in a thousand
    density = 0.0 if kind == "normal" else math.exp(-(TRUNCATION**2) / 2) / math.sqrt(2 * math.pi) / (1 - 2 * tail)
    variance = 1 - 2 * TRUNCATION * density
    fourth = 3 - 2 * (TRUNCATION**3 + 3 * TRUNCATION) * density
    assert x.mean().item() == pytest.approx(0, abs=4 / math.sqrt(n))
    assert x.square().mean().item() == pytest.approx(variance, abs=4 * math.sqrt(2 / n))
    assert x.pow(3).mean().item() == pytest.approx(0, abs=4 * math.sqrt(15 / n))
    assert x.pow(4).mean().item() == pytest.approx(fourth, abs=4 * math.sqrt(96 / n))
    assert (x[1:] * x[:-1]).mean().item() == pytest.approx(0, abs=4 / math.sqrt(n))  # neighbours


@pytest.mark.parametrize(("kind", "largest"), [("normal", 5.294704), ("trunc_normal", TRUNCATION)])
def test_ends_of_the_generator_are_finite(kind, largest):
    """The smallest and the largest of its 2²³ numbers; this stream has both, at these places."""
    ends = 203_569, 172_030
    uniform = _uniform(0, "w", 0, 2**18)
    assert [uniform[i].item() for i in ends] == [2.0**-24, 1 - 2.0**-24] == [uniform.min(), uniform.max()]
    x = init_leaf(Spec((2**18,), ("embed",), Init(kind, 1.0)), 0, "w")
    assert [x[i].item() for i in ends] == pytest.approx([-largest, largest], rel=1e-3)


def test_seeds_and_paths_differ():
    """Every (seed, path) has a stream of its own, uncorrelated with the others."""
    leaf = Spec((20_000,), ("embed",), Init("normal", 1.0))
    pairs = [
        (0, "a"),
        (1, "a"),
        (2**40, "a"),
        (0, "b"),
        (0, "blocks.1.w"),
        (0, "blocks.11.w"),
        (1, "1/a"),
        (11, "/a"),
    ]
    streams = torch.stack([init_leaf(leaf, seed, path) for seed, path in pairs])
    correlation = torch.corrcoef(streams) - torch.eye(len(pairs))
    assert correlation.abs().max() < 4.5 / math.sqrt(20_000)


def test_dtype_and_abstract():
    """Values are drawn in fp32 and then rounded; the abstract tree has shapes and no memory."""
    full, rounded = init(SPECS, 0), init(SPECS, 0, torch.bfloat16)
    for path, p in tree.items(rounded):
        assert torch.equal(p, tree.at(full, path).bfloat16())
    meta = spec.abstract(SPECS, torch.bfloat16)
    assert {path: (p.shape, p.dtype, p.device.type) for path, p in tree.items(meta)} == {
        path: (p.shape, p.dtype, "meta") for path, p in tree.items(rounded)
    }
