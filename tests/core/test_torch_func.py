"""The loss is an ordinary function: torch.func differentiates, batches and composes it."""

import pytest
import torch
from helpers import params_of
from torch.func import grad, grad_and_value, jvp, vmap
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.chain import IGNORE
from olmo_fn.core.pipe import grad as gradients
from olmo_fn.core.pipe import pipe
from olmo_fn.models import transformer
from olmo_fn.models.config import dense

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

MODELS = {
    "gqa": dense(16, 2, 4, 24, vocab_size=30, n_kv_heads=2, init_std=0.3),
    "tied_windows": dense(16, 2, 2, 24, vocab_size=30, tie_embeddings=True, window_pattern=(3, -1), init_std=0.3),
}


@pytest.fixture(params=MODELS)
def case(request):
    """A model's loss, parameters in fp64, and a batch with documents and tokens without loss."""
    cfg = MODELS[request.param]
    g = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(0, 30, (2, 9), generator=g),
        "labels": torch.randint(0, 30, (2, 9), generator=g).masked_fill(torch.rand(2, 9, generator=g) < 0.2, IGNORE),
        "documents": torch.tensor([[0] * 4 + [1] * 5, [0] * 9]),
    }
    return transformer.loss(cfg, z_loss=1e-2), params_of(cfg, 0), batch


def direction(params, seed):
    g = torch.Generator().manual_seed(seed)
    return tree.map(lambda p: torch.randn(p.shape, generator=g, dtype=p.dtype), params)


def moved(params, along, by):
    return tree.map(lambda p, v: p + by * v, params, along)


def dot(a, b):
    return sum((x * tree.at(b, path)).sum() for path, x in tree.items(a))


def test_grad_is_the_tape(case):
    """torch.func.grad of the summed loss is the tape's gradient times the tokens that it divides by."""
    loss, params, batch = case
    expected, (_, metrics) = grad_and_value(loss, has_aux=True)(params, batch)
    tokens = (batch["labels"] != IGNORE).sum()
    got, report = pipe(loss, gradients("tape", dtype=torch.float64))(params, batch)
    assert_close(tree.map(lambda g: g * tokens, got), expected)
    assert_close(report["ce"] * tokens, metrics["ce"])


@pytest.mark.parametrize("name", MODELS)
def test_vmap_over_seeds(name):
    """Losses and gradients of several models at once are those of one after the other."""
    cfg = MODELS[name]
    loss = transformer.loss(cfg, z_loss=1e-2)
    models = [params_of(cfg, seed) for seed in range(3)]
    stacked = tree.map(lambda *ps: torch.stack(ps), *models)
    ids = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.roll(-1, dims=1)}
    f = grad_and_value(loss, has_aux=True)
    grads, (values, metrics) = vmap(f, in_dims=(0, None))(stacked, batch)
    for i, params in enumerate(models):
        one, (value, parts) = f(params, batch)
        assert_close(values[i], value)
        assert_close(tree.map(lambda x, i=i: x[i], metrics), parts)
        assert_close(tree.map(lambda x, i=i: x[i], grads), one)
    assert values.std() > 0


def test_vmap_over_examples(case):
    """The gradient of each row of the batch; since losses are sums, they add up to the whole's."""
    loss, params, batch = case
    row = lambda params, one: grad(loss, has_aux=True)(params, tree.map(lambda x: x[None], one))[0]  # noqa: E731
    each = vmap(row, in_dims=(None, 0))(params, batch)
    assert_close(tree.map(lambda g: g.sum(0), each), grad(loss, has_aux=True)(params, batch)[0])


def test_jvp_against_differences(case):
    """The derivative along a direction is the central difference, and the gradient's product with it."""
    loss, params, batch = case
    v = direction(params, 1)
    f = lambda p: loss(p, batch)[0]  # noqa: E731
    value, tangent = jvp(f, (params,), (v,))
    assert_close(value, f(params))
    h = 1e-5
    assert_close(tangent, (f(moved(params, v, h)) - f(moved(params, v, -h))) / (2 * h), rtol=1e-7, atol=1e-6)
    assert_close(tangent, dot(grad(f)(params), v))
    assert tangent.abs() > 1


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_hessian_vector_product(case, mode):
    """Second derivatives along a direction are the central difference of gradients, and symmetric."""
    loss, params, batch = case
    v, u = direction(params, 2), direction(params, 3)
    slope = grad(lambda p: loss(p, batch)[0])

    def product(v):
        if mode == "forward_over_reverse":
            return jvp(slope, (params,), (v,))[1]
        return grad(lambda p: dot(slope(p), v))(params)

    h = 1e-5
    got = product(v)
    for path, x in tree.items(tree.map(torch.sub, slope(moved(params, v, h)), slope(moved(params, v, -h)))):
        expected = x / (2 * h)
        assert_close(tree.at(got, path), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
        assert expected.abs().max() > 1e-3
    assert_close(dot(u, got), dot(v, product(u)))
