"""What a compiled step costs besides its time: few compilations, and memory that stays."""

import platform
import subprocess
import sys
from collections import Counter
from functools import cache, partial

import pytest
import torch
from optimizers import wrap_with
from torch._dynamo import convert_frame

from olmo_fn.core.chain import bind
from olmo_fn.core.pipe import clip, grad, pipe, with_execution
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw
from olmo_fn.spec import init


def compilations(monkeypatch, cfg, length, dtype, mean_length=None):
    """Names of the functions that Dynamo compiles for three steps, and how often."""
    seen = Counter()
    plain = convert_frame.compile_frame

    def counted(code, *args, **kwargs):
        seen[code.co_qualname] += 1
        return plain(code, *args, **kwargs)

    monkeypatch.setattr(convert_frame, "compile_frame", counted)
    step = pipe(transformer.loss(cfg), grad(dtype=dtype), clip(1.0), adamw(1e-3))
    once = partial(torch.compile, fullgraph=True, dynamic=False, isolate_recompiles=True, backend="eager")
    fuse = cache(lambda fn, *constants: once(bind(fn, *constants)))
    step = with_execution(step, fuse=fuse, kernel=wrap_with("eager"))
    state = step.init(init(transformer.specs(cfg), 0))
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(cfg.vocab_size, (2, length + 1), generator=generator)
        batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        if mean_length:
            batch["documents"] = (torch.rand(2, length, generator=generator) < 1 / mean_length).cumsum(1)
        state, _ = step(state, batch)
    return seen


@pytest.mark.parametrize(("dtype", "mean_length"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 60)])
def test_every_function_compiles_once(monkeypatch, dtype, mean_length):
    """Each costs one or two seconds: all blocks, tiles of every document, norms and leaves share theirs, but a leaf's for a
    gradient's dtype.
    """
    seen = compilations(monkeypatch, dense(32, 3, 4, 48, vocab_size=80), 400, dtype, mean_length)
    assert seen.pop("guarded.<locals>.guarded") == (1 if dtype == torch.float32 else 2)
    assert seen.pop("bind.<locals>.bound") == 2  # norm_and_rotate_by_head and add_normed, with their constants
    assert set(seen.values()) == {1}
    tiles = {"_weigh", "_total", "_gradient"} if dtype == torch.bfloat16 else set()  # in fp32 torch's own kernel attends
    assert set(seen) == {
        *tiles,
        "gated_silu",
        "_gated_silu_gradient",
        "_softmax_times",
    }


FREED = """
import resource, torch
from olmo_fn.train.machine import keep_freed_memory

def faults(mb):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mb << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(24)
print(faults(24))
keep_freed_memory()
for _ in range(10):  # until the allocator's own caches of small rests are full
    faults(24)
print(sum(faults(24) for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_is_kept():
    """A tensor made again and again: fresh pages each time before `keep_freed_memory`, none after it."""
    out = subprocess.run([sys.executable, "-c", FREED], check=True, capture_output=True, text=True).stdout
    before, after = map(int, out.split())
    assert before >= 12  # 6,144 pages of 4 kB, or 12 of 2 MB
    assert after < before / 10
