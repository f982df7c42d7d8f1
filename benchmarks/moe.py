"""A step of a small OLMoE (8 experts, 2 of them for a token, 512 wide), in turn with peers on the same machine.

    python benchmarks/moe.py --rounds 3 --peers olmo-core transformers

Peers are OLMo-core 3.0.0, whose kernels for experts are Triton's and run on a CPU in Triton's interpreter only, and OLMoE of
transformers, with its grouped products. The step is loss, gradient, clip and AdamW on new random tokens. Prints a JSON line for
each program, the median over the rounds, and how many times as fast as each peer olmo_fn is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INTERPRETED = {"TRITON_INTERPRET": "1"}
PROGRAMS = ("olmo_fn", "dense", "transformers", "olmo-core")
"""``dense``: olmo_fn without experts, with as many active parameters."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"d-model": 512, "n-layers": 4, "n-heads": 8, "experts": 8, "top-k": 2, "expert-size": 1024, "vocab-size": 4096}
    more = {"sequence-length": 512, "batch-size": 4, "steps": 5, "threads": os.cpu_count(), "rounds": 3, "timeout": 600}
    for name, default in (sizes | more).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--peers", nargs="*", choices=PROGRAMS[1:], default=["dense", "transformers"])
    parser.add_argument("--olmo-core-python", default="", help="interpreter with ai2-olmo-core 3.0.0; made if not given")
    parser.add_argument("--program", choices=PROGRAMS, default=None, help="run this one, once, in this process")
    return parser.parse_args()


Steps = Iterator[float]
"""The loss of one step after the other."""


def olmo_fn(args: argparse.Namespace, experts: bool = True) -> Steps:
    """This library's own recipe, compiled."""
    import torch

    from olmo_fn.core.compile import prepare_cache
    from olmo_fn.models import transformer
    from olmo_fn.models.config import Attention, Block, Model, SwiGLU
    from olmo_fn.models.settings.moe import MoE
    from olmo_fn.spec import init
    from olmo_fn.train.config import Config, Recipe, Run
    from olmo_fn.train.optimizers import AdamW
    from olmo_fn.train.recipe import recipe
    from olmo_fn.train.schedules import Constant

    moe: Any = MoE(num_experts=args.experts, top_k=args.top_k, expert_size=args.expert_size)
    feed_forward = moe if experts else SwiGLU(hidden_size=args.top_k * args.expert_size)
    block = Block(mixer=Attention(n_heads=args.n_heads), feed_forward=feed_forward)
    cfg = Config(
        Model(args.d_model, args.n_layers, args.vocab_size, block),
        optim=AdamW(lr=1e-3),
        schedule=Constant(warmup=0),
        recipe=Recipe(args.batch_size, args.sequence_length),
        run=Run(steps=100),
    )
    prepare_cache(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    step = recipe(cfg, torch.float32 if args.dtype == "fp32" else torch.bfloat16)
    state = step.init(init(transformer.specs(cfg.model), 0))
    for ids in tokens(args):
        state, metrics = step(state, {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})
        yield float(metrics["ce"])


def trained(args: argparse.Namespace, model: Any, loss: Callable[[Any], tuple[Any, float]]) -> Steps:
    """A torch module with AdamW and clipping."""
    import torch

    optim = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for ids in tokens(args):
        optim.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if args.dtype == "bf16" else nullcontext():
            total, said = loss(ids)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        yield said


def transformers(args: argparse.Namespace) -> Steps:
    """OLMoE of transformers, with its grouped products, eager."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.d_model,
        intermediate_size=args.expert_size,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        output_router_logits=True,
        max_position_embeddings=args.sequence_length,
    )
    model = OlmoeForCausalLM(config).train()

    def loss(ids: Any) -> tuple[Any, float]:
        found = model(input_ids=ids[:, :-1], labels=ids[:, :-1])  # shifted inside
        return found.loss, float(found.loss)

    return trained(args, model, loss)


def olmo_core(args: argparse.Namespace) -> Steps:
    """OLMo-core's dropless mixture, whose kernels run in Triton's interpreter (`INTERPRETED`).

    Its kernels try out sizes of blocks first, which needs a GPU: the first size is taken.
    """
    import torch
    from olmo_core.data.utils import get_labels  # type: ignore[import-not-found]
    from olmo_core.nn.attention import AttentionBackendName  # type: ignore[import-not-found]
    from olmo_core.nn.moe import MoEConfig, MoERouterConfig, MoEType  # type: ignore[import-not-found]
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig  # type: ignore[import-not-found]
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = property(lambda tuner: lambda call, **how: [0.0, 0.0, 0.0])
    config = TransformerConfig.llama_like(
        d_model=args.d_model,
        vocab_size=args.vocab_size,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        qk_norm=True,
        layer_norm_eps=1e-6,
        rope_theta=500_000,
        block_name=TransformerBlockType.moe_reordered_norm,
        attn_backend=AttentionBackendName.torch,
        feed_forward_moe=MoEConfig(
            name=MoEType.dropless,
            num_experts=args.experts,
            hidden_size=args.expert_size,
            router=MoERouterConfig(top_k=args.top_k),
            lb_loss_weight=0.01,
            z_loss_weight=0.001,
        ),
    )
    model = config.build(init_device="cpu")
    model.init_weights(max_seq_len=args.sequence_length, device=torch.device("cpu"))

    def loss(ids: Any) -> tuple[Any, float]:
        ids = ids[:, :-1].contiguous()
        labels = get_labels({"input_ids": ids})
        count = (labels != -100).sum()
        out = model(ids, labels=labels, loss_reduction="sum", loss_div_factor=count, return_logits=False)
        return out.loss, float(out.ce_loss)

    return trained(args, model.train(), loss)


def tokens(args: argparse.Namespace) -> Iterator[Any]:
    """Batches without end, the same for every program."""
    import torch

    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(args.vocab_size, (args.batch_size, args.sequence_length + 1), generator=generator)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Two steps that do not count, then the timed ones."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    make = {
        "olmo_fn": olmo_fn,
        "dense": lambda args: olmo_fn(args, experts=False),
        "transformers": transformers,
        "olmo-core": olmo_core,
    }[args.program]
    times, losses = [], []
    steps = make(args)
    for _ in range(2 + args.steps):
        start = time.perf_counter()
        losses.append(next(steps))
        times.append(time.perf_counter() - start)
    rate = args.batch_size * args.sequence_length / statistics.median(times[2:])
    return {"program": args.program, "tokens_per_s": round(rate, 1), "loss_first": losses[0], "loss_last": losses[-1]}


def main() -> None:
    """Each program once a round, in turn."""
    args = parse()
    if args.program:
        print(json.dumps(measure(args)))
        return
    python = dict.fromkeys(PROGRAMS, sys.executable)
    if "olmo-core" in args.peers:
        sys.path.insert(0, str(HERE))
        from compare import peer_python  # type: ignore[import-not-found]

        python["olmo-core"] = args.olmo_core_python or peer_python(HERE / ".olmo-core")
    rates: dict[str, list[float]] = {program: [] for program in ("olmo_fn", *args.peers)}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(args.rounds):
            for program in rates:
                command = [python[program], __file__, *sys.argv[1:], "--program", program]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(cache, "compiled"))}
                environment |= INTERPRETED if program == "olmo-core" else {}
                done = subprocess.run(
                    command,
                    env=environment,
                    check=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    timeout=args.timeout,
                )
                line = json.loads(done.stdout.splitlines()[-1])
                rates[program].append(line["tokens_per_s"])
                print(json.dumps(line), flush=True)
    ours = statistics.median(rates["olmo_fn"])
    ratios = {program: round(ours / statistics.median(rates[program]), 3) for program in args.peers}
    print(json.dumps({"dtype": args.dtype, "tokens_per_s": ours, "times_as_fast_as": ratios}))


if __name__ == "__main__":
    main()
