"""The Triton kernels that Inductor makes of a function for an H100, generated and compiled where there is no GPU.

`pretend_h100` changes torch for the rest of the process: call it in one of its own.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from olmo_fn.testing.machine_code import MachineCode, compile_triton


class Kernel(NamedTuple):
    """A generated kernel: how often it goes over its tensors, and what it moves through memory."""

    name: str
    loops: int
    """Loops over a row; a kernel without one has each row at once."""
    bytes: int
    """Every tensor that it touches, read and written once."""
    bytes_by_loop: int
    """Every tensor as often as a loop touches it: what moves if nothing stays in a cache from one loop to the next."""
    source: str


@contextmanager
def pretend_h100() -> Iterator[None]:
    """Make Inductor and Triton believe that there is an H100; nothing can be run on it."""
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    device = {"is_available": True, "current_device": 0, "get_device_properties": _H100}
    cuda = {**device, "device_count": 1, "is_initialized": True, "_is_compiled": True, "_lazy_init": None}
    cuda["get_device_capability"] = (9, 0)
    interface = {**device, "get_compute_capability": 90, "get_raw_stream": 0}
    interface |= {"is_triton_capable": True, "raise_if_triton_unavailable": None}
    answers = {"get_current_target": GPUTarget("cuda", 90, 32), "get_active_torch_device": torch.device("cuda", 0)}
    answers |= {"get_current_device": 0, "get_current_stream": 0, "is_active": True, "get_device_capability": (9, 0)}
    fake = SimpleNamespace(**{name: _always(value) for name, value in answers.items()})
    with ExitStack() as stack:
        for owner, values in (
            (torch.cuda, cuda),
            (CudaInterface, interface),
            (CudaInterface.Worker, device),
        ):
            for name, value in values.items():
                answer = _always(value) if owner is torch.cuda else staticmethod(_always(value))
                stack.enter_context(mock.patch.object(owner, name, answer, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _always(0), create=True))
        stack.enter_context(mock.patch.object(driver, "_active", fake))
        stack.callback(has_triton.cache_clear)
        has_triton.cache_clear()
        yield


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


class _H100:
    name, major, minor, multi_processor_count, total_memory = "NVIDIA H100 80GB HBM3", 9, 0, 132, 85 * 10**9
    warp_size, regs_per_multiprocessor, max_threads_per_multi_processor, max_threads_per_block = 32, 65536, 2048, 1024
    gcnArchName, L2_cache_size, clock_rate, memory_clock_rate, memory_bus_width = "", 50 << 20, 1980000, 2619000, 5120
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = 49152, 232448, 233472
    uuid, pci_bus_id = "", 0


def generate(fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of ``fn(*inputs)`` and, if an input requires a gradient, of its backward, as `compile` would have them.

    ``inputs`` are on the CPU and may be fake (`FakeTensorMode`): only their shapes and dtypes are used.
    """
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import fresh_cache

    found: list[list[Kernel]] = []

    def inner(gm: torch.fx.GraphModule, examples: Any, **options: Any) -> Any:
        mode = detect_fake_mode(examples)
        assert mode is not None
        found.append(_kernels(_on_cuda(gm, mode), mode, options))
        return _boxed(gm)

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
        return compile_fx(gm, examples, inner_compile=inner)

    torch._dynamo.reset()
    with fresh_cache():
        out = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
        outs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
        if outs:
            torch.autograd.backward(outs, [torch.empty_like(x) for x in outs])
    return found[0], found[1] if len(found) > 1 else []


def _boxed(gm: torch.fx.GraphModule) -> Any:
    def run(args: list[Any]) -> Any:
        return gm(*args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _on_cuda(gm: torch.fx.GraphModule, mode: Any) -> torch.fx.GraphModule:
    """The same graph of tensors on a GPU, with what Inductor does to a graph before it lowers it (torch 2.13)."""
    from torch._inductor.compile_fx import _recursive_record_original_output_strides, view_to_reshape
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    gm, device = deepcopy(gm), torch.device("cuda", 0)
    for node in gm.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    view_to_reshape(gm)
    with mode, torch.no_grad():
        values = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
        FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*(x.to(device) if isinstance(x, Tensor) else x for x in values))
    _recursive_record_original_output_strides(gm)
    return gm


def _kernels(gm: torch.fx.GraphModule, mode: Any, options: dict[str, Any]) -> list[Kernel]:
    from torch._inductor.compile_fx import _recursive_post_grad_passes
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with pretend_h100(), V.set_fake_mode(mode), DebugContext(), torch.no_grad():
        _recursive_post_grad_passes(gm, is_inference=options.get("is_inference", False))
        inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
        known = {name: options[name] for name in ("is_inference", "is_backward", "static_input_idxs") if name in options}
        known.pop("static_input_idxs", None)
        graph = GraphLowering(gm, example_inputs=inputs, shape_env=mode.shape_env, **known)
        with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
            graph.run(*inputs)
            code, _ = graph.codegen()
            return list(_read(code.value, lambda name: _size(graph, name)))


def _size(graph: Any, name: str) -> int:
    return int(graph.sizevars.optimization_hint(graph.get_numel(name), fallback=1) * graph.get_dtype(name).itemsize)


def _read(code: str, size: Callable[[str], int]) -> Iterator[Kernel]:
    """The kernels that generated ``code`` calls, in their order. ``size`` has the bytes of a buffer by its name."""
    sources = dict(re.findall(r"async_compile\.triton\('(\w+)', '''\n(.*?)'''", code, re.S))
    own = re.findall(r"(workspace_\d+) = empty_strided_cuda\(\((\d+), \), \(1, \), torch\.(\w+)\)", code)
    work = {name: int(count) * getattr(torch, dtype).itemsize for name, count, dtype in own}
    run, parts = r"(\w+)\.run\((.*), stream", r"\w+ = (workspace_\d+)\[.*\]\.view\(.*\.sum"
    calls = rf"^ +(?:{run}|{parts}|(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.aten\.[\w.]+)\()"
    for name, arguments, summed, library in re.findall(calls, code, re.M):
        if summed:  # of the parts of a sum over rows, one by each block of threads
            yield Kernel("sum of parts", 0, work[summed], work[summed], "")
        elif library:
            raise NotImplementedError(f"{library}: a call of a library in a function that is to be elementwise")
        else:
            source = sources[name]
            meta = ast.literal_eval(re.search(r"'signature': (\{.*?\})", source)[1])  # type: ignore[index]
            given = zip(meta, arguments.split(", "), strict=False)
            sizes = {key: work.get(value) or size(value) for key, value in given if meta[key].startswith("*")}
            first, *loops = re.split(r"^    for .*$", source[source.index("@triton.jit") :], flags=re.M)
            sections = [first, *loops]
            touched = [{(op, ptr) for op, ptr in re.findall(r"tl\.(load|store)\((\w+)", text)} for text in sections]
            once = sum(sizes[ptr] for _, ptr in set().union(*touched))
            yield Kernel(name, len(loops), once, sum(sizes[ptr] for part in touched for _, ptr in part), source)


def compile_generated(kernel: Kernel) -> MachineCode:
    """Its machine code for an H100, with the first of the sizes that Inductor would try which spills nothing, or the last."""
    from torch._inductor.runtime import triton_helpers

    with tempfile.TemporaryDirectory() as folder, pretend_h100():
        file = Path(folder) / "kernel.py"
        file.write_text(kernel.source)
        spec = importlib.util.spec_from_file_location(kernel.name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with mock.patch.object(triton_helpers, "set_driver_to_gpu", _always(None)):
            spec.loader.exec_module(module)
        tuned = getattr(module, kernel.name)
        for config in tuned.configs:
            code = compile_triton(
                tuned.fn, tuned.triton_meta["signature"], config.kwargs, 90, config.num_warps, config.num_stages
            )
            if not code.spills:
                break
        return code
