"""Attention with windows, documents, sinks and capped scores: the plain form is the definition, and every fast form agrees."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from olmo_fn.core.chain import Backend
from olmo_fn.core.primitive import primitive
from olmo_fn.kernels.attention import attend, document_starts, visible
from olmo_fn.kernels.attention_backend import need_of
from olmo_fn.kernels.attention_cp import attend_over, attend_over_vjp, check_attend, positions_of
from olmo_fn.kernels.attention_cpu import WHOLE
from olmo_fn.kernels.attention_sight import TILE, Sight
from olmo_fn.kernels.attention_table import attend_vjp, choose_auto
from olmo_fn.kernels.tiles import TILES
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.nn.attention import attention
from olmo_fn.nn.context import Context

DOUBLE = torch.float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}
T = 2 * TILE + 44
HEADS = [(4, 4), (4, 2), (4, 1)]


def tensors(heads, kv_heads, length=T, dtype=DOUBLE, seed=0):
    """q, k, v, sinks, and the starts of short and long documents, other ones in each sequence."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, length, 6, generator=g, dtype=DOUBLE) * 2
    k, v = torch.randn(2, 2, kv_heads, length, 6, generator=g, dtype=DOUBLE) * 2
    sinks = torch.randn(heads, generator=g, dtype=DOUBLE)
    documents = (torch.rand(2, length, generator=g) < 0.02).cumsum(-1)
    return *(x.to(dtype) for x in (q, k, v, sinks)), document_starts(documents)


def by_definition(q, k, v, *, window=None, documents=None, offset=0, sinks=None, cap=None):
    """One softmax over all columns and, as one column more, the sink; all heads and positions written out."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    rows = torch.arange(offset, offset + q.shape[2])
    sees = visible(rows, torch.arange(k.shape[2]), window)
    if documents is not None:
        sees = sees & (documents[:, None, rows, None] == documents[:, None, None, : k.shape[2]])
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~sees, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    return scores.softmax(-1)[..., : k.shape[2]] @ v


def law_pullback(fn, vjp, *inputs, close=1e-10):
    """A faster form gives the value of the plain one, and its pullback the plain one's derivative, within ``close`` of the
    largest entry.
    """
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = fn(*leaves)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).to(expected.dtype)
    with torch.no_grad():
        out, pullback = vjp(*inputs)
        found = pullback(out, cotangent)
    for one, other in zip((out, *found), (expected, *torch.autograd.grad(expected, leaves, cotangent)), strict=True):
        assert_close(one, other, rtol=0, atol=close * other.abs().max().item())


def options_of(documents, window, cap, masked):
    return {"window": window, "cap": cap, "documents": documents if masked else None}


# --- the definition, and the fast form --------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sunk", "cap"), [(False, None), (True, None), (False, 3.0), (True, 3.0)])
@pytest.mark.parametrize("window", [None, 7, 150])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_both_forms_are_softmax_attention(heads, kv_heads, window, sunk, cap, masked):
    """The plain form equals one softmax written out, the fast one the plain one, their gradients included."""
    q, k, v, sinks, documents = tensors(heads, kv_heads)
    options = options_of(documents, window, cap, masked)
    inputs = (q, k, v, sinks) if sunk else (q, k, v)

    def named(fn):
        return lambda q, k, v, *sinks: fn(q, k, v, **options, **({"sinks": sinks[0]} if sinks else {}))

    law_pullback(named(attend), lambda *x: vjp_of(named(by_definition), *x), *inputs)
    law_pullback(named(attend), named(attend_vjp), *inputs)


def vjp_of(fn, *inputs):
    """A plain function as a form with a pullback."""
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = fn(*leaves)
    return out.detach(), lambda _, cotangent: torch.autograd.grad(out, leaves, cotangent)


@pytest.mark.parametrize("offset", [1, TILE, 200])
@pytest.mark.parametrize("window", [None, 40])
def test_rows_from_an_offset_on(offset, window):
    """The last rows alone are those of the whole, with documents that began before them."""
    q, k, v, sinks, documents = tensors(4, 2)
    whole = attend(q, k, v, window=window, documents=documents, sinks=sinks, cap=3.0)
    options = {"window": window, "documents": documents, "offset": offset, "cap": 3.0}
    assert_close(attend(q[:, :, offset:], k, v, sinks=sinks, **options), whole[:, :, offset:], **EXACT)

    def named(fn):
        return lambda q, k, v, sinks: fn(q, k, v, sinks=sinks, **options)

    law_pullback(named(attend), named(attend_vjp), q[:, :, offset:], k, v, sinks)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("masked", [False, True])
def test_in_fp32(heads, kv_heads, masked):
    """Also where torch's own kernel attends, which takes sinks by the log-sum-exp, and no cap."""
    q, k, v, sinks, documents = tensors(heads, kv_heads, dtype=torch.float32)
    q, k, v = q / 2, k / 2, v / 2  # of the usual size: sharper softmaxes magnify the rounding of scores
    assert choose_auto(need_of(q, k)) is (WHOLE if heads == kv_heads else TILES)
    assert choose_auto(need_of(q, k, cap=3.0)) is TILES
    for cap in (None, 3.0):
        options = options_of(documents, None, cap, masked)
        law_pullback(
            lambda q, k, v, s, o=options: attend(q, k, v, sinks=s, **o),
            lambda q, k, v, s, o=options: attend_vjp(q, k, v, sinks=s, **o),
            *(q, k, v, sinks),
            close=2e-6,
        )


def test_in_bf16():
    """Within its rounding of the definition on the same numbers, in dtypes of what they are the gradients of."""
    *inputs, documents = tensors(4, 2, dtype=torch.bfloat16)
    options = options_of(documents, 150, 3.0, masked=True)
    out, pullback = attend_vjp(*inputs[:3], sinks=inputs[3], **options)
    found = (out, *pullback(out, torch.ones_like(out)))
    exact, exact_pullback = vjp_of(lambda q, k, v, s: attend(q, k, v, sinks=s, **options), *(x.double() for x in inputs))
    for one, other in zip(found, (exact, *exact_pullback(exact, torch.ones_like(exact))), strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one.double(), other, rtol=0, atol=0.02 * other.abs().max().item())


def test_extreme_sinks():
    """One far below all scores changes nothing; one far above takes all the weight, and nothing overflows."""
    q, k, v, sinks, _ = tensors(4, 2, length=40, dtype=torch.float32)
    for fn in (attend, lambda *x, **options: attend_vjp(*x, **options)[0]):
        assert_close(fn(q, k, v, sinks=sinks - 1e4), fn(q, k, v))
        assert_close(fn(q, k, v, sinks=sinks + 1e4), torch.zeros_like(q))


def test_the_laws_catch():
    """Mutants: a pullback without the sinks' part in the softmax, without the cap's slope, and with the sinks' sign turned."""
    q, k, v, sinks, _ = tensors(2, 2, length=60)
    mutants = {
        "no sink": lambda *x: (attend(*x[:3], sinks=x[3]), lambda o, c: (*attend_vjp(*x[:3])[1](o, c), c.sum((0, 2, 3)))),
        "sign": lambda *x: turned(*attend_vjp(*x[:3], sinks=x[3])),
        "cap": lambda *x: (attend(*x[:3], sinks=x[3], cap=1.0), attend_vjp(*x[:3], sinks=x[3])[1]),
    }
    for name, mutant in mutants.items():
        right = partial(attend, cap=1.0 if name == "cap" else None)
        with pytest.raises(AssertionError):
            law_pullback(lambda *x, fn=right: fn(*x[:3], sinks=x[3]), mutant, q, k, v, sinks)


def turned(out, pullback):
    def back(out, cotangent):
        *found, d_sinks = pullback(out, cotangent)
        return *found, -d_sinks

    return out, back


# --- what is computed -------------------------------------------------------------------------------------------------


def brute_force(sight, B, R, T):
    """What rows see of columns, (B, R, T), pair by pair."""
    rows, columns = torch.arange(R) + sight.offset, torch.arange(T) + sight.key_offset
    sees = visible(rows, columns, sight.window).expand(B, R, T)
    if sight.documents is not None:
        sees = sees & (sight.documents[:, rows, None] == sight.documents[:, None, columns])
    return sees


def law_tiles(sight, B, R, T):
    """Tiles hold every pair that sees each other, once; of rows each column is seen, of columns each row sees."""
    sees = brute_force(sight, B, R, T)
    for tiles, dim in ((sight.row_tiles, 1), (sight.column_tiles, 2)):
        covered = torch.zeros_like(sees, dtype=torch.int64)
        for tile in tiles(B, R, T):
            covered[tile] += 1
            assert sees[tile].any(dim).all()
        assert covered.max() <= 1
        assert (covered[sees] == 1).all()


@st.composite
def sights(draw):
    """A place in a sequence of documents: some rows, and keys from some position up to the last row or before."""
    B, length = draw(st.integers(1, 3)), draw(st.integers(1, 3 * TILE + 5))
    starts = st.lists(st.integers(0, length - 1), max_size=6)
    numbers = torch.zeros(B, length, dtype=torch.int64)
    for row in numbers:
        row[draw(starts)] = 1
    offset, key_offset = (draw(st.integers(0, length - 1)) for _ in range(2))
    R = draw(st.integers(1, length - offset))
    T = draw(st.integers(1, max(1, offset + R - key_offset)).filter(lambda T: key_offset + T <= length))
    window = draw(st.none() | st.integers(1, length))
    documents = document_starts(numbers.cumsum(1)) if draw(st.booleans()) else None
    return Sight(window, documents, offset, key_offset), B, R, T


@given(sights())
def test_tiles_are_what_is_seen(case):
    """With documents for each sequence its own; without them, or where only causality counts, for all at once."""
    law_tiles(*case)


def test_a_mutant_of_tiles_is_caught(monkeypatch):
    """Tiles for all sequences at once are wider than what some of them see."""
    documents = document_starts((torch.arange(400) >= torch.tensor([[150], [300]])).long())
    law_tiles(Sight(documents=documents), 2, 400, 400)
    with monkeypatch.context() as patch:
        patch.setattr(Sight, "_on_host", None)
        with pytest.raises(AssertionError):
            law_tiles(Sight(documents=documents), 2, 400, 400)


def packed(B, length, mean, seed=0):
    """Documents of random lengths, one after the other, as a loader packs them."""
    g = torch.Generator().manual_seed(seed)
    return document_starts((torch.rand(B, length, generator=g) < 1 / mean).cumsum(-1))


def flops(documents, window=None, heads=2, kv_heads=2, K=4):
    """Of forward and backward, as torch counts them in what was run."""
    B, length = documents.shape
    q, k = torch.zeros(B, heads, length, K, dtype=DOUBLE), torch.zeros(B, kv_heads, length, K, dtype=DOUBLE)
    with FlopCounterMode(display=False) as counter:
        out, pullback = attend_vjp(q, k, k, window=window, documents=documents)
        forward = counter.get_total_flops()
        pullback(out, out)
    return forward, counter.get_total_flops() - forward


def law_cost(documents, window=None, heads=2, kv_heads=2, K=4):
    """Two products forward and five backward, of every tile of rows with the columns that it sees, or the other way round."""
    sees = brute_force(Sight(window, documents), *documents.shape, documents.shape[1])
    cells = [sum(part.shape[dim] * int(part.any(dim).sum()) for row in sees for part in row.split(TILE, dim)) for dim in (0, 1)]
    found = flops(documents, window, heads, kv_heads, K)
    assert found == tuple(n * 2 * K * heads * products for n, products in zip(cells, (2, 5), strict=True))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_documents_cost_what_they_should(monkeypatch, window, kv_heads):
    """The law; and without a window, documents of about 64 tokens cost a third of one of 1,024."""
    documents = packed(3, 1024, 64)
    law_cost(documents, window, kv_heads=kv_heads)
    if window is None:
        for short, long in zip(flops(documents), flops(torch.zeros_like(documents)), strict=True):
            assert short < long / 3
    with monkeypatch.context() as patch:  # a mutant: the mask alone
        patch.setattr(Sight, "_on_host", None)
        with pytest.raises(AssertionError):
            law_cost(documents, window, kv_heads=kv_heads)


class Lengths(TorchDispatchMode):
    """Lengths of what torch's own attention is called with."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if "flash_attention" in str(fn):
            self.found.append(args[0].shape[2])
        return fn(*args, **kwargs or {})


def test_torchs_own_attention_sees_one_document_at_a_time():
    """Forward and backward: no two documents are multiplied."""
    documents = packed(2, 300, 50)
    lengths = [int(n) for row in documents for n in row.unique_consecutive(return_counts=True)[1]]
    q = torch.zeros(2, 2, 300, 4)
    with Lengths() as seen:
        out, pullback = attend_vjp(q, q, q, documents=documents)
        pullback(out, out)
    assert seen.found == 2 * lengths
    assert len(lengths) > 4


# --- over ranks -------------------------------------------------------------------------------------------------------

CASES = [(None, None, False), (None, None, True), (70, None, True), (None, 3.0, True), (70, 3.0, False)]


def on_a_rank(connection, method, case, sunk, attend=attend_vjp):
    """This rank's positions, and the results of both forms for them, with their gradients."""
    window, cap, masked = case
    cp = connection.axes.cp
    *whole, sinks, documents = tensors(4, 4, length=320)
    local = positions_of(320, cp)
    inputs = [x[:, :, local].contiguous() for x in whole] + [sinks] * sunk
    cotangent = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)[:, :, local]
    options = options_of(documents, window, cap, masked) | {"cp": cp, "method": method}

    def named(fn):
        return lambda q, k, v, *s: fn(q, k, v, **options, **({"sinks": s[0]} if s else {}))

    out, pullback = vjp_of(named(attend_over), *inputs)
    fast, fast_pullback = named(partial(attend_over_vjp, attend=attend))(*inputs)
    return local, (out, *pullback(out, cotangent)), (fast, *fast_pullback(fast, cotangent.contiguous()))


def law_ranks(results, case, sunk):
    """The ranks' parts together are the whole, and the sinks' gradients add up."""
    window, cap, masked = case
    q, k, v, sinks, documents = tensors(4, 4, length=320)
    inputs = [q, k, v] + [sinks] * sunk
    cotangent = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    options = options_of(documents, window, cap, masked)
    out, pullback = vjp_of(lambda q, k, v, *s: attend(q, k, v, **options, sinks=s[0] if s else None), *inputs)
    expected = (out, *pullback(out, cotangent))
    order = torch.cat([local for local, *_ in results]).argsort()
    for form in (1, 2):
        parts = list(zip(*(result[form] for result in results), strict=True))
        for one, whole in zip(parts[:4], expected[:4], strict=True):
            assert_close(torch.cat(one, 2)[:, :, order], whole, **EXACT)
        for one, whole in zip(parts[4:], expected[4:], strict=True):
            assert_close(sum(one), whole, **EXACT)


@pytest.mark.parametrize("method", ["gather", "ulysses", "ring"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_over_ranks(pool, method, ranks):
    """With windows, documents, sinks and a cap, on real ranks."""
    for case in CASES if ranks == 2 else CASES[2:4]:
        law_ranks(pool.run(on_a_rank, method, case, True, mesh=Mesh(cp=ranks)), case, True)


def cost_of_a_rank(connection, method, documents):
    """FLOPs forward and backward, with documents and without."""
    cp = connection.axes.cp
    q = torch.zeros(len(documents), 2, documents.shape[1] // cp.size, 4, dtype=DOUBLE)
    found = []
    for masked in (documents, None):
        with FlopCounterMode(display=False) as counter:
            out, pullback = attend_over_vjp(q, q, q, cp=cp, method=method, documents=masked)
            pullback(out, out)
        found.append(counter.get_total_flops())
    return found


@pytest.mark.parametrize("method", ["gather", "ulysses", "ring"])
def test_documents_cost_less_on_every_rank(pool, method):
    """With any method, documents of about 64 tokens cost a third of one of 1,024."""
    for short, long in pool.run(cost_of_a_rank, method, packed(2, 1024, 64), mesh=Mesh(cp=2)):
        assert short < long / 3


# --- the sublayer's primitive, and other backends ---------------------------------------------------------------------

IDS = torch.zeros(1, 1, dtype=torch.int64)


def test_sinks_are_a_weight():
    """Plain and fast agree; the gradient of the sinks goes where those of weights go."""
    q, k, v, sinks, documents = (x.requires_grad_() if x.is_floating_point() else x for x in tensors(4, 2, length=50))
    taken = []
    backends = [
        Backend(),
        Backend(primitive),
        Backend(primitive, weight_grads=lambda w, gradient: w is sinks and not taken.append(gradient())),
    ]
    found = []
    for backend in backends:
        ctx = Context(backend, IDS, IDS, IDS, documents)
        out = attention(ctx, q, k, v, 30, sinks=sinks, cap=3.0)
        found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), (q, k, v, sinks), allow_unused=True)])
    assert_close(found[1], found[0], **EXACT)
    assert found[2][-1] is None
    assert_close(taken[0], found[0][-1], **EXACT)


def others(q, k, v, *, window=None, documents=None, offset=0, kernel=None):
    """Somebody else's attention, which knows no sinks and no caps."""
    return attend_vjp(q, k, v, window=window, documents=documents, offset=offset)


def test_another_attention_is_asked_only_for_what_it_takes(pool):
    """Without sinks and cap it is used as it is; with them it is refused by name, and does not run."""
    q, k, v, sinks, _ = tensors(4, 2, length=50)
    cp = Axis("cp")
    assert_close(attend_over_vjp(q, k, v, cp=cp, attend=others)[0], attend(q, k, v), **EXACT)
    with pytest.raises(ValueError, match="the attention others takes no sinks= and no cap=; choose"):
        attend_over_vjp(None, None, None, cp=cp, attend=others, sinks=sinks, cap=2.0)
    with pytest.raises(ValueError, match="takes no cap=;"):
        check_attend(others, "cap")
    check_attend(partial(attend_vjp, window=3), "sinks", "cap")
