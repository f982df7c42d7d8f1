"""What goes to fla-core's kernels, and what is made of what they give, by a stand-in with their interface that computes the
definition: the kernels themselves run on GPUs alone."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from olmo_fn.kernels import gated_delta_fla
from olmo_fn.kernels.gated_delta import chunked_over, recurrent
from olmo_fn.kernels.packing import Packing
from olmo_fn.mesh.axis import Axis


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    """As fla-core 0.6 declares it: positions before heads, and with cumulative lengths one row of sequences."""
    assert scale is None
    assert q.is_contiguous()
    assert (len(q) == 1) == (cu_seqlens is not None)
    heads = [x.transpose(1, 2) for x in (q, k, v, g, beta)]
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    out = []
    for start, stop in pairwise(ends):
        if start < stop:
            part = [x[:, :, start:stop] for x in heads]
            state = torch.zeros(len(q), v.shape[2], q.shape[3], v.shape[3], dtype=v.dtype)
            out.append(recurrent(*part, state)[0])
    return torch.cat(out, 2).transpose(1, 2), None


@pytest.fixture
def package(monkeypatch):
    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)


@pytest.mark.parametrize("documents", [None, torch.tensor([[0] * 9 + [9] * 11, [0] * 20])])
@pytest.mark.parametrize("packed", [False, True])
def test_the_package_is_given_what_it_wants(package, documents, packed):
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(2, 2, 20, 4, dtype=torch.float64), dim=-1) for _ in range(2))
    v, g, beta = (torch.rand(2, 6, 20, *more, dtype=torch.float64) for more in ((5,), (), ()))
    age = None if documents is None else torch.arange(20) - documents
    packing = Packing.of(documents) if packed and documents is not None else None
    found = gated_delta_fla.fla(q, k, v, -g, beta, documents, packing)
    assert_close(found, chunked_over(Axis(), q, k, v, -g, beta, age), rtol=1e-12, atol=1e-12)


class OnGPU:
    """What is looked at of a tensor on a GPU."""

    is_cuda, is_meta, device = True, False, torch.device("cuda")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs the package fla-core, which is not installed: pip install 'olmo-fn[fla]'"),
        ({"installed": True, "once": False}, "can be differentiated once, and not by --recipe.engine func"),
        ({"installed": True, "cp": 2}, "knows no states of other ranks, and --mesh.cp is 2"),
    ],
)
def test_what_it_lacks_is_said_by_name(monkeypatch, options, said):
    installed = options.pop("installed", False)
    monkeypatch.setattr(gated_delta_fla, "find_spec", lambda name: object() if installed else None)
    assert gated_delta_fla.choose_rule("auto", OnGPU, **options) == "chunked"
    with pytest.raises(ValueError, match=re.escape(f"--model.rule fla {said}; choose chunked, or auto")):
        gated_delta_fla.choose_rule("fla", OnGPU, **options)


def test_it_is_taken_where_it_can_be(monkeypatch):
    monkeypatch.setattr(gated_delta_fla, "find_spec", lambda name: object())
    assert gated_delta_fla.choose_rule("auto", OnGPU) == gated_delta_fla.choose_rule("fla", OnGPU) == "fla"
    assert gated_delta_fla.choose_rule("chunked", OnGPU) == "chunked"
