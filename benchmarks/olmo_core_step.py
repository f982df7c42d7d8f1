"""One training step of OLMo-core 3.0.0, in its own best form, as a peer to measure against.

Run it with a Python that has ``ai2-olmo-core`` installed; it prints one JSON line. Everything inside the step
is OLMo-core's own: model, LM head and loss, labels, per-block compilation, optimizer config. What is left out
is its trainer (data loading, metrics, callbacks), and ``apply_compile`` is called on the model because the
trainer skips compilation off-GPU. The Inductor cache is whatever ``TORCHINDUCTOR_CACHE_DIR`` says, so the
caller decides cold or warm.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import time


def parse_args(argv=None):
    """The settings of one run; all of them are repeated in the printed row."""
    parser = argparse.ArgumentParser(description="Time one OLMo-core training step and print a JSON line.")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--n-heads", type=int, default=8)
    parser.add_argument("--n-kv-heads", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a step")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16 means autocast")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after two of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def build(args):
    """The OLMo2-like model and its AdamW, built in the order of OLMo-core's train module."""
    import torch
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig
    from olmo_core.optim import AdamWConfig

    config = TransformerConfig.llama_like(
        d_model=args.d_model,
        vocab_size=args.vocab_size,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        qk_norm=True,
        layer_norm_eps=1e-6,
        rope_theta=500_000,
        block_name=TransformerBlockType.reordered_norm,
        attn_backend=AttentionBackendName.torch,
        feed_forward=FeedForwardConfig(hidden_size=args.hidden_size, bias=False),  # exact: no rounding up
    )
    model = config.build(init_device="meta")
    if args.compile:
        model.apply_compile()
    model.init_weights(max_seq_len=args.sequence_length, device=torch.device("cpu"))
    optim = AdamWConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True).build(model)
    return model.train(), optim


def train_step(model, optim, input_ids, dtype):
    """Labels, forward, backward, clip and update; returns the mean loss as a tensor."""
    import torch
    from olmo_core.data.utils import get_labels

    optim.zero_grad(set_to_none=True)
    labels = get_labels({"input_ids": input_ids})
    amp = torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()
    with amp:
        out = model(
            input_ids,
            labels=labels,
            loss_reduction="sum",
            loss_div_factor=(labels != -100).sum(),
            return_logits=False,
        )
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optim.step()
    model.post_optim_step()
    return out.ce_loss


def run(args):
    """Two warm-up steps, then the timed ones, a new random batch each; returns the row to print."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch loads OpenMP
    import torch
    from olmo_core.version import VERSION

    torch.set_num_threads(args.threads)
    model, optim = build(args)
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, args.sequence_length)
    seconds, losses = [], []
    for _ in range(2 + args.steps):
        input_ids = torch.randint(args.vocab_size, shape, generator=generator)
        start = time.perf_counter()
        loss = train_step(model, optim, input_ids, args.dtype)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())

    step = statistics.median(seconds[2:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes, but bytes on macOS
    return {
        "impl": "olmo-core",
        "version": VERSION,
        "torch": torch.__version__,
        "tokens_per_s": round(args.batch_size * args.sequence_length / step, 1),
        "step_ms": round(1e3 * step, 2),
        "step_ms_min": round(1e3 * min(seconds[2:]), 2),
        "warmup_s": round(sum(seconds[:2]), 3),
        "peak_rss_mb": round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "params": sum(p.numel() for p in model.parameters()),
        **vars(args),
    }


if __name__ == "__main__":
    print(json.dumps(run(parse_args())))
