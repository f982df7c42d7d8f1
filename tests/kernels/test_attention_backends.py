"""Backends of attention: which one is taken, and that what is around each kernel makes it the definition.

Nobody has run the kernels of a GPU here. What they promise is computed in fp64 on a CPU (`flash_contract`), so that every law
runs over the code that hands rows, keys, windows and documents over to them. FlexAttention runs itself.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from flash_contract import promised
from hypothesis import assume, given, settings
from test_attention import (
    DOUBLE,
    HEADS,
    brute_force,
    law_pullback,
    law_ranks,
    on_a_rank,
    options_of,
    sights,
    tensors,
)
from torch.nn.attention import flex_attention as flex
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.gradients import Execution
from olmo_fn.core.pipe import accumulate, grad, pipe
from olmo_fn.kernels import attention_flex
from olmo_fn.kernels.attention import attend, attend_masked, document_starts
from olmo_fn.kernels.attention_backend import HALF, Need, Scores
from olmo_fn.kernels.attention_cpu import WHOLE
from olmo_fn.kernels.attention_cudnn import CUDNN
from olmo_fn.kernels.attention_flash import ATEN, FLASH, FLASH_3, FlashKernels, flash_backend
from olmo_fn.kernels.attention_flex import FLEX
from olmo_fn.kernels.attention_package import PACKAGE
from olmo_fn.kernels.attention_sight import Sight
from olmo_fn.kernels.attention_table import BACKENDS, choose
from olmo_fn.kernels.packing import Packing
from olmo_fn.kernels.tiles import TILES
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models import transformer
from olmo_fn.models.batch import with_packing
from olmo_fn.models.config import Attention, dense
from olmo_fn.spec import init
from olmo_fn.train.check_attention import attention_of, check_attention
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.recipe import recipe

CPU = torch.device("cpu")
H100 = Need("cuda", torch.bfloat16, 128, capability=(9, 0))


@pytest.fixture
def kernels():
    with promised():
        yield


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention refuses a backward pass on a CPU, for which it has a plain form all the same; it is not compiled here."""
    run_flex_on_cpu(monkeypatch.setattr)


def run_flex_on_cpu(put):
    put(flex, "_validate_device", lambda *tensors: None)
    put(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    put(attention_flex, "compiled_flex", lambda: flex.flex_attention)


# --- laws -------------------------------------------------------------------------------------------------------------


def law_backend(backend, window=None, masked=False, cap=None, heads=(4, 2), sunk=True, offset=0, length=150):
    """Law 9: its result is `attend`, and its pullback the derivative; sinks included."""
    q, k, v, sinks, documents = tensors(*heads, length=length)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))  # as projections leave them
    options = options_of(documents, window, cap, masked) | {"offset": offset}

    def named(fn):
        return lambda q, k, v, *sinks: fn(q, k, v, **options, **({"sinks": sinks[0]} if sinks else {}))

    law_pullback(named(attend), named(backend), q[:, :, offset:], k, v, *([sinks] if sunk else []))


@pytest.mark.parametrize("backend", [FLASH, PACKAGE], ids=lambda backend: backend.name)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 149, 400])
def test_flash_attention_is_the_definition(kernels, backend, window, masked):
    """With windows, documents, grouped heads and sinks; and of the last rows alone, as a gather over ``cp`` asks for them."""
    for heads in HEADS:
        law_backend(backend, window, masked, heads=heads, sunk=heads != (4, 4))
    for offset in (1, 70, 149):
        law_backend(backend, window, masked, offset=offset)


def test_the_packages_soft_caps(kernels):
    for masked in (False, True):
        law_backend(PACKAGE, 7, masked, cap=3.0)


def test_cudnn_is_the_definition(kernels):
    for heads in HEADS:
        law_backend(CUDNN, heads=heads, sunk=heads != (4, 4))


@pytest.mark.parametrize(
    ("window", "cap", "masked", "heads", "offset"), [(None, None, False, (4, 4), 0), (7, 3.0, True, (4, 2), 70)]
)
def test_flex_attention_is_the_definition(flex_on_cpu, window, cap, masked, heads, offset):
    law_backend(FLEX, window, masked, cap, heads, offset=offset)


def test_flex_attention_sees_documents_that_were_overwritten(flex_on_cpu):
    q, k, v, _, documents = tensors(4, 2, length=40)
    FLEX(q, k, v, documents=documents)
    documents.zero_()
    assert_close(FLEX(q, k, v, documents=documents)[0], attend(q, k, v))


@given(sights())
@settings(max_examples=60)
def test_rows_and_keys_of_any_part(case):
    """Forward and backward of a part of the keys: a row that sees none of them has 0, and no weight where parts are merged."""
    sight, B, R, T = case
    shift = sight.offset - sight.key_offset
    assume(shift >= 0 and (sight.window is None or shift - sight.window + 1 < T))
    ends_together = shift + R <= T
    assume(sight.documents is None or ends_together or (shift >= T and sight.window is None))
    g = torch.Generator().manual_seed(0)
    q, d_out = torch.randn(2, B, 2, R, 4, generator=g, dtype=DOUBLE)
    k, v = torch.randn(2, B, 1, T, 4, generator=g, dtype=DOUBLE)
    mask = brute_force(sight, B, R, T)[:, None]
    some = mask.any(-1, keepdim=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = attend_masked(leaves[0].unflatten(1, (1, 2)), *leaves[1:], mask | ~some) * some
    with promised():
        out, lse, kept = FLASH.forward(Scores(sight), q, k, v)
        found = FLASH.backward(Scores(sight), q, k, v, d_out, out, lse.where(some[..., 0], 0.0), kept, None)
    assert_close(out, expected, rtol=0, atol=1e-12)
    assert (lse < -1e20).logical_or(some[..., 0]).all()
    for one, other in zip(found, torch.autograd.grad(expected, leaves, d_out), strict=True):
        assert_close(one, other, rtol=0, atol=1e-12)


def law_cp(pool, backend, method, case, sunk=True):
    law_ranks(pool.run(with_kernels, backend, method, case, sunk, mesh=Mesh(cp=2)), case, sunk)


def with_kernels(connection, backend, method, case, sunk):
    with pytest.MonkeyPatch.context() as patch, promised():
        run_flex_on_cpu(patch.setattr)
        return on_a_rank(connection, method, case, sunk, attend=MUTANTS.get(backend) or BY_NAME[backend])


BY_NAME = {"flash": FLASH, "cudnn": CUDNN, "package": PACKAGE, "flex": FLEX}
PLAIN, WINDOW, PACKED, BOTH = (None, None, False), (70, None, False), (None, None, True), (70, None, True)
CP = [
    *(("flash", "gather", case) for case in (PLAIN, BOTH)),
    *(("flash", "ulysses", case) for case in (PLAIN, BOTH)),
    *(("flash", "ring", case) for case in (PLAIN, WINDOW, PACKED)),
    *(("cudnn", method, PLAIN) for method in ("ulysses", "ring")),
    ("package", "gather", (70, 3.0, True)),
    ("package", "ring", (70, 3.0, False)),
    ("flex", "ring", (70, 3.0, True)),
]


@pytest.mark.parametrize(("backend", "method", "case"), CP)
def test_context_parallelism(pool, backend, method, case):
    """Law 2, on real ranks: a ring merges by log-sum-exp, and its backward passes take the result of the whole."""
    law_cp(pool, backend, method, case)


# --- mutants ----------------------------------------------------------------------------------------------------------


def shifted_window(q, k, v, lengths, window, cap):
    return ATEN.forward(q, k, v, lengths, window._replace(left=window.left + 1 if window.left >= 0 else -1), cap)


def narrow_backward(*parts):
    *before, window, cap = parts
    return ATEN.backward(*before, window._replace(left=5), cap)


def of(change):
    """FLASH of another sight."""

    def changed(scores):
        return scores._replace(sight=change(scores.sight))

    return FLASH._replace(
        forward=lambda scores, *x: FLASH.forward(changed(scores), *x),
        backward=lambda scores, *x: FLASH.backward(changed(scores), *x),
    )


def local(backend):
    """The ring's backward passes take each part's own result and log-sum-exp."""

    def forward(scores, *x):
        out, lse, kept = backend.forward(scores, *x)
        return out, lse, (out, lse, kept)

    def backward(scores, q, k, v, d_out, out, lse, kept, delta):
        return backend.backward(scores, q, k, v, d_out, *kept, None)

    return backend._replace(forward=forward, backward=backward)


def short(longest):
    return of(lambda sight: sight._replace(packing=Packing(Packing.of(sight.documents).starts, longest)))


MUTANTS = {
    "window": flash_backend("window", lambda need: "", FlashKernels(shifted_window, ATEN.backward)),
    "window in backward": flash_backend("window in backward", lambda need: "", FlashKernels(ATEN.forward, narrow_backward)),
    "offset": of(lambda sight: sight._replace(offset=0)),
    "key offset": of(lambda sight: sight._replace(key_offset=0)),
    "documents joined": of(lambda sight: sight._replace(documents=None)),
    "too short": short(8),
    "local": local(FLASH),
    "local flex": local(FLEX),
}


@pytest.mark.parametrize(
    ("mutant", "options"),
    [
        ("window", {"window": 7}),
        ("window in backward", {"window": 7, "masked": True}),
        ("offset", {"offset": 70}),
        ("documents joined", {"masked": True}),
        ("too short", {"masked": True}),
    ],
)
def test_the_law_catches(kernels, mutant, options):
    with pytest.raises(AssertionError):
        law_backend(MUTANTS[mutant], **options)


@pytest.mark.parametrize(
    ("mutant", "method", "case"),
    [("local", "ring", PLAIN), ("offset", "gather", PLAIN), ("documents joined", "ring", PACKED)],
)
def test_the_law_of_ranks_catches(pool, mutant, method, case):
    with pytest.raises(AssertionError):
        law_cp(pool, mutant, method, case, sunk=False)


# --- which one is taken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("need", "name"),
    [
        (H100, "cudnn"),
        (H100._replace(grouped=True, part="ring"), "cudnn"),
        (H100._replace(deterministic=True), "flash"),
        (H100._replace(window=True), "flash"),
        (H100._replace(documents=True), "flash"),
        (H100._replace(part="rows"), "flash"),
        (H100._replace(head_dim=256), "flash"),
        (H100._replace(cap=True), "flex"),
        (H100._replace(part="ring", documents=True, window=True), "flex"),
        (H100._replace(dtype=torch.float32), "tiles"),
        (H100._replace(capability=(7, 5)), "flex"),
        (H100._replace(head_dim=100), "flex"),
        (Need("cpu", torch.float32, 64), "whole"),
        (Need("cpu", torch.float32, 64, grouped=True), "tiles"),
        (Need("cpu", torch.float32, 64, window=True), "tiles"),
        (Need("cpu", torch.float32, 64, part="rows"), "tiles"),
        (Need("cpu", torch.float32, 64, documents=True), "whole"),
        (Need("cpu", torch.bfloat16, 64), "tiles"),
        (Need("cpu", torch.float64, 64), "tiles"),
        (Need("meta", torch.bfloat16, 64), "tiles"),
    ],
)
def test_auto(need, name):
    assert choose("auto", need).name == name


@pytest.mark.parametrize(
    ("setting", "need", "refusal"),
    [
        ("flash", Need("cpu", torch.bfloat16, 64), "flash needs a GPU; choose tiles, or auto"),
        ("cudnn", H100._replace(documents=True), "cudnn has no documents; choose flash, flex, tiles, or auto"),
        ("flash", H100._replace(cap=True), "flash has no soft-capped scores; choose flex, tiles, or auto"),
        ("flash", H100._replace(dtype=torch.float32), "flash computes in bfloat16 or float16, not in float32; choose flex,"),
        ("flash", H100._replace(head_dim=20), "flash takes heads of a multiple of 8 up to 256 dims, not of 20; choose flex,"),
        ("flash-attn", H100, "flash-attn is not installed: pip install 'olmo-fn\\[flash\\]'; choose cudnn, flash,"),
        ("flash", H100._replace(part="ring", window=True, documents=True), "windows together with documents in a ring"),
    ],
)
def test_what_a_backend_lacks_is_refused_by_name(setting, need, refusal):
    with pytest.raises(ValueError, match=f"--recipe.attention {refusal}" if "ring" not in refusal else refusal):
        choose(setting, need)
    assert choose("tiles", need) is TILES


def test_flash_attention_3_is_taken_where_it_is(monkeypatch):
    """It comes before all others on an H100, and leaves soft-caps to version 2 of the same name."""
    there = {"flash_attn_interface", "flash_attn"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in there else None)
    choose.cache_clear()
    try:
        assert choose("auto", H100) is choose("flash-attn", H100) is FLASH_3
        assert choose("flash-attn", H100._replace(cap=True)) is choose("auto", H100._replace(cap=True)) is PACKAGE
        assert choose("flash-attn", H100._replace(capability=(8, 0))) is PACKAGE
        assert choose("auto", H100._replace(capability=(8, 0))) is CUDNN
    finally:
        choose.cache_clear()


def test_every_need_has_a_backend():
    """Tiles can do everything, so that ``auto`` refuses nothing; and each name of the setting is a backend's."""
    for dtype in (*HALF, torch.float32, DOUBLE):
        for part in ("whole", "rows", "ring"):
            choose("auto", Need("cuda", dtype, 20, True, True, True, True, part))
    assert [backend.name for backend in BACKENDS] == ["whole", "flash-attn", "cudnn", "flash", "flash-attn", "flex", "tiles"]


# --- packing ----------------------------------------------------------------------------------------------------------


def test_packing_pads_to_few_shapes():
    documents = document_starts(torch.tensor([[0, 0, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0]]))
    packing = Packing.of(documents)
    assert packing.starts.tolist() == [[0, 2, 3, 8], [0, 8, 8, 8]]
    assert packing.longest == 8
    assert packing.cumulative(0, 8).tolist() == [0, 2, 3, 8, 8, 16, 16, 16, 16]
    assert packing.cumulative(2, 3).tolist() == [0, 0, 1, 3, 3, 6, 6, 6, 6]


# --- a model ----------------------------------------------------------------------------------------------------------

MIXER = Attention(n_heads=4, n_kv_heads=2, window_pattern=(5, -1), qk_norm="head", gate="head", sinks=True)
MODEL = dense(32, 3, 4, 48, vocab_size=40)
MODEL = replace(MODEL, block=replace(MODEL.block, mixer=MIXER))


def documents_of(rows, length):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 40, (rows, length + 1), generator=g)
    documents = (torch.rand(rows, length, generator=g) < 0.2).cumsum(1)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "documents": documents}


def gradients(batch, *transforms, attention=None, remat="none", engine="tape"):
    found = pipe(transformer.loss(MODEL), grad(engine, remat, DOUBLE), *transforms)
    execution = Execution(dtype=DOUBLE) if attention is None else Execution(dtype=DOUBLE, attention=attention)
    return found(init(transformer.specs(MODEL), seed=0, dtype=DOUBLE), batch, execution)[0]


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_on_the_order_of_memory_that_fused_kernels_take(kernels, packed, remat):
    """Law 9 of a whole model: heads stay where projections leave them, and documents come as lengths, also in parts."""
    batch = documents_of(4, 24)
    expected = gradients(batch, engine="func")
    given = with_packing(batch, torch.device("cuda")) if packed else batch
    seen = []
    found = gradients(given, accumulate(2), attention=lambda need: seen.append(need) or FLASH, remat=remat)
    for path, leaf in tree.items(expected):
        assert_close(tree.at(found, path), leaf, rtol=1e-9, atol=1e-12, msg=path)
    assert {need.window for need in seen} == {True, False}
    assert all(need.documents and need.grouped and need.part == "whole" for need in seen)


def test_a_setting_is_what_attends():
    cfg = Config(MODEL, recipe=Recipe(attention="tiles"), run=Run(steps=5000))
    fp32 = Need("cpu", torch.float32, 8)
    assert recipe(cfg).execution.attention(fp32) is TILES
    assert recipe(replace(cfg, recipe=Recipe())).execution.attention(fp32) is WHOLE
    assert recipe(attention_of(replace(cfg, recipe=Recipe(attention="flash")), CPU)).execution.attention(fp32) is WHOLE


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"attention": "flash"}, "flash needs a GPU; choose tiles, or auto"),
        ({"attention": "cudnn", "engine": "func"}, "func attends by plain operations, and not by cudnn"),
    ],
)
def test_what_cannot_attend_is_refused_before_anything_runs(changes, refusal):
    with pytest.raises(ValueError, match=refusal):
        check_attention(Config(MODEL, recipe=Recipe(**changes)), CPU, torch.bfloat16)


def test_layers_are_looked_at_one_by_one():
    """On an H100 cuDNN has the full layers, and is refused for those with windows."""
    form = MIXER.form(MODEL, 0)
    need = form.need(CPU, torch.bfloat16, 24, documents=False)._replace(device="cuda", capability=(9, 0))
    with pytest.raises(ValueError, match="cudnn has no windows; choose flash, flex, tiles, or auto"):
        choose("cudnn", need)
    assert not MIXER.form(MODEL, 0).need(CPU, torch.bfloat16, 5, documents=False).window  # as long as the sequence


@dataclass(frozen=True, kw_only=True)
class Own(Attention):
    def attend(self):
        return TILES


def test_a_mixer_with_a_way_of_its_own_is_asked_for_none():
    model = replace(MODEL, block=replace(MODEL.block, mixer=Own(n_heads=4)))
    with pytest.raises(ValueError, match=r"attends in a way of its own; leave out --recipe\.attention"):
        check_attention(Config(model, recipe=Recipe(attention="tiles")), CPU, torch.float32)


@pytest.mark.slow
def test_flex_attention_compiled_for_a_cpu_agrees_with_tiles():
    """Its forward pass, by Inductor, which has no log-sum-exp there: a window, documents, grouped heads and a cap at once."""
    q, k, v, _, documents = tensors(4, 2, length=300, dtype=torch.float32)
    q, k, v = (x[..., :4].repeat(1, 1, 1, 4) / 2 for x in (q, k, v))
    scores = Scores(Sight(40, documents), 3.0)
    mask, capped = attention_flex._block_mask(scores.sight, q, k), attention_flex._soft_cap(3.0)
    with torch.no_grad():
        out = attention_flex.compiled_flex()(q, k, v, score_mod=capped, block_mask=mask, enable_gqa=True)
    assert_close(out, TILES.forward(scores, q, k, v)[0], rtol=1e-5, atol=1e-5)
