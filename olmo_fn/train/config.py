"""A training run as one value. Every field is a command-line flag, and its docstring is the help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from olmo_fn.data.config import Data
from olmo_fn.models.config import Model, divisors
from olmo_fn.parallel.config import MeshConfig


@dataclass(frozen=True)
class AdamW:
    """The optimizer."""

    lr: float = 4e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    no_decay: tuple[str, ...] = ("embed", "*norm")
    """Patterns of the parameters without weight decay."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the moments are kept."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the run."""

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up: half a cosine, a line, stable and then a linear decay, or constant."""
    warmup: int = 2000
    """Steps of linear warm-up from 0."""
    final: float = 0.1
    """Rate at the end, as a fraction of the peak."""
    decay: float = 0.1
    """Fraction of the run over which wsd decays."""


@dataclass(frozen=True)
class Recipe:
    """How a step computes: these fields change the numbers, except the four that are marked invisible."""

    batch_size: int = 512
    """Sequences a step."""
    sequence_length: int = 4096
    """Tokens a sequence."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    skip_sigma: float = 6.0
    """Skip a step whose loss or gradient norm is this many deviations above its recent mean; 0 turns it off."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none."""
    z_loss: float = 1e-5
    """Weight of the squared log-partition in the loss."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 where the processor multiplies it natively. Parameters are fp32 always."""
    accumulate: int = 1
    """Parts in which a batch is computed, to save memory (invisible)."""
    remat: str = "none"
    """Activations to compute again instead of keeping: none, full, feed_forward, every-2, … (invisible)."""
    engine: Literal["tape", "func"] = "tape"
    """Gradient engine: a sweep over stages, or torch.func (invisible)."""
    compile: bool = True
    """Compile every stage; the first start takes longer (invisible)."""


@dataclass(frozen=True)
class Run:
    """Where a run lives, how long it is, and what it reports."""

    folder: str = ""
    """Where everything goes; runs/<preset> when not given."""
    steps: int = 1000
    """Steps in all."""
    seed: int = 0
    """Seed of the initial weights."""
    resume: bool = True
    """Go on from the newest whole checkpoint of the folder, if it has one; --run.no-resume demands an empty folder."""
    start_from: str = ""
    """Checkpoint, or run folder, of another run whose state this run starts from."""
    checkpoint_every: int = 250
    """Steps between checkpoints; one is always written at the end. 0: only at the end."""
    keep_last: int = 0
    """Keep only this many newest checkpoints; 0 keeps all."""
    keep_every: int = 0
    """With keep_last: checkpoints at multiples of this step are kept as well."""
    eval_every: int = 0
    """Steps between evaluations on the held-out text; one is always made at the end. 0: only at the end."""
    eval_tokens: int = 500_000
    """Most held-out tokens that an evaluation reads."""
    log_every: int = 10
    """Steps between plain progress lines, when the output is not a terminal."""
    sample: str = "def "
    """Prompt of the sample at the end; empty for none."""
    threads: int = 0
    """CPU threads; 0 leaves it to torch (all cores)."""
    device: str = "auto"
    """Device to train on: auto takes cuda when there is one."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    model: Model
    """Shape of the model."""
    data: Data = field(default_factory=Data)
    """What it learns from."""
    optim: AdamW = field(default_factory=AdamW)
    """The optimizer."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate over the run."""
    recipe: Recipe = field(default_factory=Recipe)
    """How a step computes."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the processes divide the work."""
    run: Run = field(default_factory=Run)
    """Where the run lives, how long it is, what it reports."""
    dry_run: bool = False
    """Only print the resolved config, counts, the sharding plan, and memory, traffic and time a rank; read no data,
    allocate no weights."""
    gpus: int = 0
    """Only for --dry-run: processes there would be. 0: the product of the degrees of --mesh that are given."""
    gpu: Literal["a100", "h100", "h200", "b200", "mi300x"] = "h100"
    """Only for --dry-run: the accelerator that memory and time are estimated for."""

    def check(self) -> None:
        """Raise ValueError, in one line with the fix, if the numbers do not fit together."""
        self.model.check()
        r = self.recipe
        for name in ("recipe.batch_size", "recipe.sequence_length", "recipe.accumulate", "run.steps"):
            part, field_name = name.split(".")
            if getattr(getattr(self, part), field_name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if r.batch_size % r.accumulate:
            raise ValueError(
                f"--recipe.accumulate {r.accumulate} does not divide --recipe.batch-size {r.batch_size}; "
                f"choose one of {divisors(r.batch_size)}"
            )
        if not 0 <= r.ema < 1:
            raise ValueError(f"--recipe.ema {r.ema} is no decay; it must be at least 0 and below 1")
        if not self.optim.lr > 0:
            raise ValueError(f"--optim.lr {self.optim.lr} must be positive")
