"""How many parameters a model has, and how many floating-point operations a token costs."""

from __future__ import annotations

from olmo_fn import spec
from olmo_fn.models import multi_token
from olmo_fn.models.config import Model
from olmo_fn.models.transformer import layers, specs


def num_params(cfg: Model) -> int:
    """Entries of all parameters; tied embeddings count once.

    >>> from olmo_fn.models.families import OLMO2
    >>> f"{num_params(OLMO2['olmo2-32b']):,}"
    '32,234,279,936'
    """
    return spec.count(specs(cfg))


def num_non_embedding_params(cfg: Model) -> int:
    """Entries of all parameters but the embedding; the head counts, unless it is tied.

    >>> from olmo_fn.models.families import OLMO2
    >>> f"{num_non_embedding_params(OLMO2['olmo2-32b']):,}"
    '31,720,477,696'
    """
    return num_params(cfg) - cfg.vocab_size * cfg.d_model


def num_active_params(cfg: Model) -> int:
    """Entries of the parameters that a token meets: without those of the experts that it is not sent to.

    >>> from olmo_fn.models.families import OLMOE
    >>> f"{num_active_params(OLMOE['olmoe-1b-7b']):,}"
    '1,282,017,280'
    """
    built = layers(cfg)
    idle = sum(sub.idle for layer in built for sub in layer.sublayers)
    return num_params(cfg) - idle - cfg.multi_token.depth * sum(sub.idle for sub in built[-1].sublayers)


def in_words(cfg: Model) -> str:
    """How many parameters there are, and of a model with experts, how many of them a token meets.

    >>> from olmo_fn.models.families import OLMO2, OLMOE
    >>> in_words(OLMO2["olmo2-1b"]), in_words(OLMOE["olmoe-1b-7b"])
    ('1,484,916,736 parameters', '6,919,161,856 parameters (1,282,017,280 for a token)')
    """
    total, active = num_params(cfg), num_active_params(cfg)
    return f"{total:,} parameters" + (f" ({active:,} for a token)" if active < total else "")


def flops_per_sequence(cfg: Model, sequence_length: int) -> int:
    """Training FLOPs of one sequence of S tokens, an exact integer: forward, and twice that for backward.

        3 · (Σ over sublayers of their flops(S)  +  2 · V · D · S for the head  +  multi-token prediction's modules)

    A matrix costs a multiplication and an addition per entry and token; a pair of query and key costs
    2 · head_dim per head for its score, and as many for its value. What is not a matrix product (norms,
    rotation, softmax, look-up of embeddings) counts as nothing, and so does what an implementation does on
    top: masked scores, rematerialisation, padding. Documents that do not see each other are not subtracted.

    OLMo-core 3.0 counts in addition 6 per gain of the query, key and final norms, and rounds each layer's
    attention down to whole FLOPs per token. OLMo-core 2.5 counted all of S (or the window) instead of
    pairs / S, about twice as much attention.
    """
    blocks = sum(sub.flops(sequence_length) for layer in layers(cfg) for sub in layer.sublayers)
    further = multi_token.flops(cfg, layers(cfg)[-1], sequence_length)
    return 3 * (blocks + 2 * cfg.vocab_size * cfg.d_model * sequence_length + further)


def flops_per_token(cfg: Model, sequence_length: int) -> float:
    """Training FLOPs per token, averaged over a sequence; see `flops_per_sequence` for what is counted.

    >>> from olmo_fn.models.families import OLMO2, OLMO3
    >>> [f"{flops_per_token(family, 8192):.4g}" for family in (OLMO2["olmo2-7b"], OLMO3["olmo3-7b"])]
    ['4.777e+10', '4.656e+10']
    """
    return flops_per_sequence(cfg, sequence_length) / sequence_length
