"""Greedy generation against transformers, in turn, with the same random weights; prints a JSON line a batch size.

    python benchmarks/generate.py --batch-sizes 1 8 --rounds 5

The model is an OLMo 2 of 135M parameters. Every round runs each program once, so that both see the same machine; the figures
are medians over the rounds, in new tokens of all rows a second, the reading of the prompts included. On a busy machine look
at ``cpu_ratio``, which is of the seconds of processors that each took, best with ``--threads 1``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

from olmo_fn.train.environment import prepare_environment

prepare_environment()  # as the commands do, before torch is loaded: it is to the peer's good as well

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import Olmo2Config, Olmo2ForCausalLM  # noqa: E402

from olmo_fn import tree  # noqa: E402
from olmo_fn.generate.config import Sampling  # noqa: E402
from olmo_fn.generate.load import arranged  # noqa: E402
from olmo_fn.generate.sample import sample  # noqa: E402
from olmo_fn.models.config import Model, dense  # noqa: E402
from olmo_fn.models.transformer import specs  # noqa: E402
from olmo_fn.spec import abstract  # noqa: E402
from olmo_fn.tree import Tree  # noqa: E402

NAMES = {
    "embed": "embed_tokens",
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "post_attention_layernorm",
    "feed_forward.w_gate": "mlp.gate_proj",
    "feed_forward.w_up": "mlp.up_proj",
    "feed_forward.w_down": "mlp.down_proj",
    "feed_forward_norm": "post_feedforward_layernorm",
    "head.norm": "norm",
}


def main() -> None:
    """Compare at the batch sizes asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg = dense(576, 30, 9, 1536, vocab_size=49_152, tie_embeddings=True)
    theirs = peer(cfg)
    params = arranged(carried(theirs, cfg))
    for rows in args.batch_sizes:
        prompts = torch.randint(cfg.vocab_size, (rows, args.prompt), generator=torch.Generator().manual_seed(rows))
        times: dict[str, list[float]] = {"olmo_fn": [], "transformers": []}
        used: dict[str, list[float]] = {"olmo_fn": [], "transformers": []}
        found: dict[str, list[list[int]]] = {}
        for _ in range(args.rounds + 1):
            for name in times:
                start, before = time.perf_counter(), time.process_time()
                found[name] = ours(cfg, params, prompts, args.new) if name == "olmo_fn" else generate(theirs, prompts, args.new)
                times[name].append(time.perf_counter() - start)
                used[name].append(time.process_time() - before)
        speed = {name: [rows * args.new / seconds for seconds in them[1:]] for name, them in times.items()}
        ratios = [a / b for a, b in zip(speed["olmo_fn"], speed["transformers"], strict=True)]
        cpu_ratios = [b / a for a, b in zip(used["olmo_fn"][1:], used["transformers"][1:], strict=True)]
        line = {
            "batch_size": rows,
            "ratio": round(statistics.median(ratios), 3),
            "ratio_per_round": [round(ratio, 3) for ratio in ratios],
            "cpu_ratio": round(statistics.median(cpu_ratios), 3),
            "tokens_per_s": {name: round(statistics.median(them), 1) for name, them in speed.items()},
            "same_tokens": found["olmo_fn"] == found["transformers"],
            "prompt": args.prompt,
            "new": args.new,
            "threads": args.threads,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        print(json.dumps(line), flush=True)


def ours(cfg: Model, params: Tree, prompts: torch.Tensor, new: int) -> list[list[int]]:
    """The new tokens of each row."""
    steps = sample(cfg, params, prompts.tolist(), Sampling(max_tokens=new, temperature=0))
    return [list(row) for row in zip(*steps, strict=True)]


@torch.inference_mode()
def generate(model: Olmo2ForCausalLM, prompts: torch.Tensor, new: int) -> list[list[int]]:
    """The same, of transformers."""
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompts, **options)[:, prompts.shape[1] :].tolist()


def peer(cfg: Model) -> Olmo2ForCausalLM:
    """The model of transformers with random weights, at its defaults: PyTorch's fused attention, and a cache."""
    mixer = cfg.block.mixer
    torch.manual_seed(0)
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.d_model,
            intermediate_size=cfg.block.feed_forward.hidden_size,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=mixer.n_heads,
            num_key_value_heads=mixer.kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": mixer.rope_theta},
            rms_norm_eps=cfg.norm_eps,
            tie_word_embeddings=cfg.tie_embeddings,
            initializer_range=0.05,
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()


def carried(model: Olmo2ForCausalLM, cfg: Model) -> Tree:
    """Its weights in our layout."""
    weights = model.state_dict()

    def leaf(path: str, _: object) -> torch.Tensor:
        block = path.startswith("blocks.") and path.split(".", 2)
        name = f"layers.{block[1]}.{NAMES[block[2]]}" if block else NAMES[path]
        weight = weights[f"model.{name}.weight"]
        return weight.clone() if weight.ndim < 2 or path == "embed" else weight.T.contiguous()

    return tree.map_with_path(leaf, abstract(specs(cfg)))


if __name__ == "__main__":
    main()
