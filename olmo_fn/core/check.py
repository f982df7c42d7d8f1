"""What a step refuses in one line, instead of failing deep inside or training something else: batches, parameters, states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from torch import Tensor

from olmo_fn import tree
from olmo_fn.spec import Spec
from olmo_fn.tree import Tree


def check_batch(batch: Any) -> None:
    """ValueError unless a batch is tensors by name."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a dict of tensors, not a {type(batch).__name__}")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"batch[{name!r}] is a {_type(value)}; make it a tensor: torch.as_tensor(batch[{name!r}])")
        if name == "loss_tokens" and value.ndim:
            raise ValueError(
                f"loss_tokens is the number that the summed loss is divided by, 0-d, and here {tuple(value.shape)}"
            )


def check_loss(found: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """What a loss returned; ValueError unless it is a sum and metrics."""
    match found:
        case (Tensor(ndim=0) as total, Mapping() as metrics) if all(isinstance(x, Tensor) for x in metrics.values()):
            return total, metrics
        case Tensor():
            got = f"a tensor of shape {tuple(found.shape)}"
        case (Tensor() as total, Mapping() as metrics):
            odd = [f"a {_type(x)} as the metric {name!r}" for name, x in metrics.items() if not isinstance(x, Tensor)]
            got = odd[0] if odd and total.ndim == 0 else f"a sum of shape {tuple(total.shape)}"
        case _:
            got = f"a {_type(found)}"
    raise ValueError(
        f"a loss returns (sum of losses, metrics), such as `return losses.sum(), {{}}`, and this one returned {got}; "
        "give the sum and not the mean, which is divided by the batch's tokens once more"
    )


def check_tensors(params: Any) -> None:
    """ValueError unless parameters are a tree of floating tensors."""
    make = "init(transformer.specs(model), seed=0) makes them"
    if not isinstance(params, Mapping):
        raise ValueError(f"parameters are a tree of tensors, not a {_type(params)}; {make}")
    for path, p in tree.items(params):
        if isinstance(p, Spec):
            raise ValueError(f"{path} is a Spec and not yet a tensor; {make}")
        if not isinstance(p, Tensor) or not p.is_floating_point():
            raise ValueError(f"{path} is {getattr(p, 'dtype', _type(p))}; a parameter is a tensor of floating numbers")


def check_shapes(given: Tree, specs: Mapping[str, Spec], needed: Iterable[str], own: Set[str] = frozenset()) -> None:
    """ValueError, which names the first few, for leaves that are not in ``specs``, by path, or of another shape there, and for
    those of ``needed`` that are missing. What is at or under a path of ``own`` may be anything.
    """
    there, wrong = tree.flatten(given), []
    for path, p in there.items():
        if path in specs:
            if p.shape != specs[path].shape:
                wrong.append(f"{path} is {tuple(p.shape)} and must be {specs[path].shape}")
        elif own.isdisjoint(tree.ancestors(path)):
            wrong.append(f"{path} is none of them")
    wrong += [f"{path} is missing" for path in needed if path not in there]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"these are not the parameters of the loss: {'; '.join(wrong[:3])}{more}")


def _type(x: Any) -> str:
    return f"NumPy {type(x).__name__}" if type(x).__module__ == "numpy" else type(x).__name__
