"""Parameters under the names and layouts of OLMo-core and of transformers' Olmo2 and Olmo3.

Both keep a matrix as (out, in); here it is (in, out). Embedding and head are (vocab, width) everywhere.
"""

import re

from olmo_fn import tree

NAMES = {  # path here: (OLMo-core, transformers)
    "embed": ("embeddings", "model.embed_tokens"),
    "blocks.{}.attention.w_q": ("blocks.{}.attention.w_q", "model.layers.{}.self_attn.q_proj"),
    "blocks.{}.attention.w_k": ("blocks.{}.attention.w_k", "model.layers.{}.self_attn.k_proj"),
    "blocks.{}.attention.w_v": ("blocks.{}.attention.w_v", "model.layers.{}.self_attn.v_proj"),
    "blocks.{}.attention.w_out": ("blocks.{}.attention.w_out", "model.layers.{}.self_attn.o_proj"),
    "blocks.{}.attention.q_norm": ("blocks.{}.attention.q_norm", "model.layers.{}.self_attn.q_norm"),
    "blocks.{}.attention.k_norm": ("blocks.{}.attention.k_norm", "model.layers.{}.self_attn.k_norm"),
    "blocks.{}.attention_norm": ("blocks.{}.attention_norm", "model.layers.{}.post_attention_layernorm"),
    "blocks.{}.feed_forward.w_gate": ("blocks.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj"),
    "blocks.{}.feed_forward.w_up": ("blocks.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj"),
    "blocks.{}.feed_forward.w_down": ("blocks.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj"),
    "blocks.{}.feed_forward_norm": (
        "blocks.{}.feed_forward_norm",
        "model.layers.{}.post_feedforward_layernorm",
    ),
    "head.norm": ("lm_head.norm", "model.norm"),
    "head.w_out": ("lm_head.w_out", "lm_head"),
}
PEERS = ("olmo_core", "transformers")


def name(path, peer):
    """The peer's name of the parameter at ``path``.

    >>> name("blocks.3.feed_forward.w_up", "olmo_core")
    'blocks.3.feed_forward.w3.weight'
    """
    layer = re.search(r"\d+", path)
    pattern = path if layer is None else path.replace(layer[0], "{}", 1)
    return NAMES[pattern][PEERS.index(peer)].format(layer and layer[0]) + ".weight"


def export(params, peer):
    """A flat dict of the parameters as the peer names and stores them."""
    return {name(path, peer): _turn(path, p) for path, p in tree.items(params)}


def load(tensors, like, peer):
    """A tree with the paths of ``like``, filled from the peer's flat dict, which must hold nothing else."""
    names = {path: name(path, peer) for path, _ in tree.items(like)}
    left = set(tensors) - set(names.values())
    if left:
        raise ValueError(f"no place for {sorted(left)}")
    return tree.map_with_path(lambda path, _: _turn(path, tensors[names[path]]).clone(), like)


def _turn(path, p):
    return p if p.ndim < 2 or path in ("embed", "head.w_out") else p.T.contiguous()
