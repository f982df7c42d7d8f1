"""``olmo-fn convert upcycle DENSE RUN``: a model with experts that begins as a dense one (Komatsuzaki et al. 2022)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from olmo_fn.fields import Range

if TYPE_CHECKING:
    from torch import Tensor

    from olmo_fn.models.config import Model
    from olmo_fn.train.config import Config

DENSE, SPARSE = "feed_forward", "moe"
NEW = f"{SPARSE}.w_router"
MATRICES = f"{SPARSE}.experts."
MANY = Range(1, 1 << 16)


@dataclass(frozen=True)
class Upcycle:
    """Make a run of a dense model: each expert is a copy of the feed-forward network, the router is random, all else stays.

    The weights of a token's experts add up to 1, so that the first logits are those of the dense model.
    """

    dense: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DENSE")]
    """Folder of a run, or one of its checkpoints, or a Hugging Face directory."""
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder for the run; it must not be there."""
    num_experts: Annotated[int, MANY] = 8
    """How many experts each layer gets."""
    top_k: Annotated[int, MANY] = 2
    """How many of them a token goes to."""
    dense_layers: Annotated[int, Range(0, 1024)] = 0
    """The first so many layers keep their dense network."""
    seed: int = 0
    """Of the routers."""
    step: int | None = None
    """Of a run, take the checkpoint of this step instead of the newest whole one."""
    weights: Literal["params", "ema", "merge"] = "params"
    """Of a run, the weights; or their moving average, or the mean of the last steps, if it kept one."""


def upcycle(args: Upcycle) -> int:
    """Make the run, whole or not at all, and say what to type next. ValueError for a model that is not dense."""
    from olmo_fn.convert.run import check_new
    from olmo_fn.models.count import in_words

    check_new(args.run)
    is_run = (args.dense / "config.yaml").is_file() or (args.dense / "index.json").is_file()
    before, after, said = (of_run if is_run else of_directory)(args)
    print(f"{args.run}: {in_words(after)}, from {in_words(before)} of {args.dense}")
    print(said)
    return 0


def of_directory(args: Upcycle) -> tuple[Model, Model, str]:
    """Make it of a Hugging Face directory."""
    from olmo_fn.convert.run import write_run
    from olmo_fn.formats.huggingface import READ, open_directory

    if args.step is not None or args.weights != "params":
        raise ValueError(f"{args.dense} is no run, which --step and --weights are of; leave them out")
    directory = open_directory(args.dense)
    made = with_experts(directory.model, args)
    pick = upcycled(directory.model, made, directory.parameter, args.seed)
    meta = {"upcycled": str(args.dense.resolve()), "dtype": READ[directory.dtype]}
    change: Callable[[Config], Config] = lambda cfg: replace(cfg, model=made)  # noqa: E731
    return directory.model, made, write_run(args.dense, args.run, pick, READ[directory.dtype], meta, change)


def of_run(args: Upcycle) -> tuple[Model, Model, str]:
    """Make it of a run's checkpoint; the run's settings are kept."""
    import sys

    import torch

    from olmo_fn.convert.run import save_run, train_on
    from olmo_fn.formats.text_files import KEPT
    from olmo_fn.train.config import Init, Lora
    from olmo_fn.train.process import ProcessContext
    from olmo_fn.train.session import find_run, open_run

    folder, checkpoint = find_run(args.dense, args.step)
    session = open_run(folder, ProcessContext(torch.device("cpu")))
    model = session.cfg.model
    made = with_experts(model, args)
    start = replace(session.cfg.run, folder=str(args.run), start_from="", start_with="state")
    cfg = replace(session.cfg, model=made, run=start, init=Init(), lora=Lora())
    cfg.check()

    def files(draft: Path) -> None:
        for name in ("tokenizer.json", KEPT):
            if (path := folder / name).is_dir():
                shutil.copytree(path, draft / name)
            elif path.is_file():
                shutil.copyfile(path, draft / name)

    def write(path: Path) -> None:
        pick = upcycled(model, made, one_after_another(session.stream_model(path, args.weights)), args.seed)
        save_run(cfg, args.run, pick, {"upcycled": str(path.resolve())}, files)

    if session.find(checkpoint or folder, write, on_skip=lambda line: print(line, file=sys.stderr)) is None:
        raise ValueError(f"{args.dense} holds no whole checkpoint; one is written every --run.checkpoint-every steps")
    return model, made, train_on(args.run)


def with_experts(model: Model, args: Upcycle) -> Model:
    """The model with experts that are as wide as its feed-forward networks.

    ValueError, in one line, if it has experts, or networks that experts cannot be copies of.
    """
    from olmo_fn.models.config import MoE, SwiGLU

    def sparse(block: Any) -> Any:
        network = block.feed_forward
        if network.num_experts:
            raise ValueError(f"{args.dense} has experts already, {network.num_experts} in a layer; give a dense model")
        if network != SwiGLU(hidden_size=getattr(network, "hidden_size", 0)):
            raise ValueError(
                f"{args.dense} has feed-forward networks of the kind {network.name}, or with biases; experts are copies of "
                "networks of the kind swiglu without biases"
            )
        moe = MoE(
            num_experts=args.num_experts,
            top_k=args.top_k,
            expert_size=network.hidden_size,
            weight_norm=1.0,
            dense_layers=args.dense_layers,
            dense_size=network.hidden_size,
        )
        return replace(block, feed_forward=moe)

    if args.dense_layers >= model.n_layers:
        raise ValueError(f"--dense-layers is {args.dense_layers}, and the model has {model.n_layers} layers; leave some")
    used = not model.pattern or model.block in model.pattern
    made = replace(model, block=sparse(model.block) if used else model.block, pattern=tuple(map(sparse, model.pattern)))
    try:
        made.check()
    except ValueError as error:
        raise ValueError(str(error).replace("--model.", "--")) from None
    return made


def upcycled(before: Model, after: Model, parameter: Callable[[str], Tensor], seed: int = 0) -> Callable[[str], Tensor]:
    """Each parameter of the model with experts by its path, out of those of the dense one.

    A network's matrix (D, F) is that of each expert, (E, D, F); a router is what it would be in a new model.
    """
    import torch

    from olmo_fn import tree
    from olmo_fn.models.transformer import specs
    from olmo_fn.spec import init_leaf

    new = tree.flatten(specs(after))
    old = tree.flatten(specs(before))

    def found(path: str) -> torch.Tensor:
        if path in old:
            return parameter(path)
        if path.endswith(NEW):
            return init_leaf(new[path], seed, path)
        dense = parameter(dense_path(path))
        return dense.expand(new[path].shape).contiguous() if MATRICES in path else dense

    return found


def dense_path(path: str) -> str:
    """What a parameter is called in the dense model.

    >>> dense_path("blocks.1.moe.experts.w_up"), dense_path("blocks.1.post_moe_norm")
    ('blocks.1.feed_forward.w_up', 'blocks.1.post_feed_forward_norm')
    """
    return path.replace(MATRICES, f"{DENSE}.").replace(f"{SPARSE}_", f"{DENSE}_")


def one_after_another(stream: Iterator[tuple[str, Tensor]]) -> Callable[[str], Tensor]:
    """The tensors of a stream by their paths, once each; what came before it is kept until it is asked for."""
    waiting: dict[str, Tensor] = {}

    def take(path: str) -> Tensor:
        while path not in waiting:
            waiting.update([next(stream)])
        return waiting.pop(path)

    return take
