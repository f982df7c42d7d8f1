"""A training run as one value. Every field is a command-line flag, and its docstring is the help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from olmo_fn.data.settings import Data
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models.config import Model, divisors
from olmo_fn.train.check_mesh import check_layout
from olmo_fn.train.numbers import check_numbers

SIGNED = ("model.block.mixer.window_pattern", "schedule.exponent", "run.seed")
"""Fields whose numbers may be negative."""


@dataclass(frozen=True)
class Optim:
    """The optimizer. Fields that are None take its own default."""

    name: Literal["adamw", "lion", "sgd", "adafactor", "schedule-free", "muon", "normuon", "dion", "soap"] = "adamw"
    """The optimizer; muon, normuon, dion and soap get the matrices, and AdamW the embedding, the head, norms and biases."""
    lr: float = 4e-4
    """Peak learning rate. Those of muon, normuon, soap and schedule-free are like AdamW's; lion wants about a tenth."""
    adamw_lr: float | None = None
    """Peak learning rate of the AdamW beside muon, normuon, dion and soap; the same when not given."""
    betas: tuple[float, float] | None = None
    """Decay of the first and of the second moment; of AdamW's, too, where it is beside another."""
    eps: float | None = None
    """Added to the root of the second moment."""
    momentum: float | None = None
    """Momentum of sgd, muon, normuon and dion."""
    nesterov: bool | None = None
    """Look ahead by the momentum, in sgd, muon and normuon."""
    rank: float | None = None
    """Rank of dion's steps, as a fraction of a matrix's smaller side."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    no_decay: tuple[str, ...] = ("embed", "*norm", "*bias")
    """Patterns of the parameters without weight decay; just embed is OLMo-core's rule."""
    cautious: bool = False
    """Decay only the entries that the step moves towards zero as well."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which moments and momentum are kept."""
    first_step_bias: bool = False
    """Correct AdamW's bias as if each step were the first, as OLMo 2 32B was trained (step_increment_bugfix=False)."""

    def check(self) -> None:
        """Raise ValueError, in one line, if the numbers do not fit together."""
        for name in ("lr", "adamw_lr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--optim.{name.replace('_', '-')} {value} must be positive")
        if self.rank is not None and not 0 < self.rank <= 1:
            raise ValueError(f"--optim.rank {self.rank} is a fraction of a matrix's smaller side: more than 0, at most 1")
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("--optim.nesterov needs a momentum in sgd; add --optim.momentum 0.9")
        for name in ("adamw_lr", "betas", "eps", "momentum", "nesterov", "rank"):
            if getattr(self, name) is not None and name not in USES[self.name]:
                users = ", ".join(user for user, used in USES.items() if name in used)
                raise ValueError(f"--optim.{name.replace('_', '-')} is not for --optim.name {self.name}; it is for {users}")
        if self.first_step_bias and self.name != "adamw":
            raise ValueError(f"--optim.first-step-bias is for --optim.name adamw, not {self.name}")
        if self.name == "adafactor" and self.moments != "float32":
            raise ValueError("--optim.moments bfloat16 is not for --optim.name adafactor, which keeps only rows and columns")


BESIDE = ("adamw_lr", "betas", "eps")  # of the AdamW for what is no matrix
USES: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps"),
    "lion": ("betas",),
    "sgd": ("momentum", "nesterov"),
    "adafactor": (),
    "schedule-free": ("betas", "eps"),
    "muon": ("momentum", "nesterov", *BESIDE),
    "normuon": ("momentum", "nesterov", *BESIDE),
    "dion": ("momentum", "rank", *BESIDE),
    "soap": BESIDE,
}
"""Which of the fields without a value each optimizer takes."""


ScheduleName: TypeAlias = Literal[
    "cosine",
    "linear",
    "wsd",
    "constant",
    "half-cosine",
    "inv-sqrt",
    "cosine-linear",
    "power",
    "wsds",
    "piecewise",
    "sequential",
    "range-test",
]


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the run."""

    name: ScheduleName = "cosine"
    """Shape after the warm-up; range-test rises exponentially from `lowest` to the rate instead. To see them:
    python -m olmo_fn.plot schedule cosine wsd."""
    warmup: int | float = 2000
    """Length of the linear warm-up; with a point, such as 0.02, a fraction of the run."""
    warmup_from: float = 0.0
    """Rate at the start of the warm-up, as a fraction of the peak."""
    final: float = 0.1
    """Rate at the end, as a fraction of the peak."""
    decay: int | float = 0.1
    """Length of the last, linear decay of wsd, wsds (of each period), cosine-linear and power; with a point a fraction."""
    floor: float = 0.1
    """What the cosine of cosine-linear heads for, as a fraction of the peak."""
    exponent: float = -0.51
    """Exponent of power."""
    lowest: float = 1e-7
    """Rate at which range-test starts."""
    lengths: tuple[int, ...] = ()
    """Lengths of the periods of wsds, of the pieces of piecewise, of the parts of sequential but the last."""
    levels: tuple[float, ...] = ()
    """As fractions of the peak: the rates of the periods of wsds, the ends of the pieces of piecewise."""
    shapes: tuple[Literal["linear", "cosine", "constant"], ...] = ()
    """Of each piece of piecewise, or part of sequential, which starts with the rate that the one before ended with."""
    anneal_at: int = 0
    """Leave the schedule here, and fall in a line to `final` over `decay`; 0: never."""
    units: Literal["steps", "tokens"] = "steps"
    """Unit of all these lengths."""


@dataclass(frozen=True)
class Growth:
    """Batch size and sequence length that grow to those of the recipe during the run."""

    batch_sizes: tuple[int, ...] = ()
    """Smaller batch sizes to begin with, in order; then recipe.batch_size."""
    until: tuple[int, ...] = ()
    """For each of them the step, or number of tokens, at which the next one takes over."""
    units: Literal["steps", "tokens"] = "steps"
    """Unit of `until`."""
    sqrt_lr: bool = False
    """Multiply the rate by √(batch size / first batch size): for Adam and its kin; optim.lr is the first batch's."""
    min_length: int = 0
    """Sequence length to begin with; from there it grows in a line. 0: recipe.sequence_length throughout."""
    length_steps: int = 2000
    """Steps over which the sequence length grows."""
    length_multiple: int = 128
    """Sequence lengths are multiples of this."""
    truncate: bool = False
    """Train on the beginning of each window only, instead of on all of it in shorter sequences."""


@dataclass(frozen=True)
class Lora:
    """Train low-rank changes of some matrices, and nothing else (LoRA)."""

    rank: int = 0
    """Rank of the changes; 0 trains the whole model."""
    alpha: float = 16.0
    """The change is multiplied by alpha / rank."""
    patterns: tuple[str, ...] = ("*.attention.w_*", "*.feed_forward.w_*")
    """Patterns of the matrices to adapt."""


@dataclass(frozen=True)
class Recipe:
    """How a step computes: these fields change the numbers, except the four that are marked invisible."""

    batch_size: int = 512
    """Sequences a step."""
    sequence_length: int = 4096
    """Tokens a sequence."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    clip_value: float = 0.0
    """Largest entry of the gradient, before its norm is clipped; 0 turns it off."""
    skip_sigma: float = 6.0
    """Skip a step whose loss or gradient norm is this many deviations above its recent mean; 0 turns it off."""
    skip_steps: tuple[tuple[int, int], ...] = ()
    """Ranges of steps, ends included, whose batches are read and not learned from, such as 100 120."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none."""
    merge_last: int = 0
    """Keep the mean of the weights over this many steps up to each multiple of merge_every; 0 keeps none."""
    merge_every: int = 1000
    """Steps between the ends of such means."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    normalize: bool = False
    """Keep the rows of all matrices at length 1, as nGPT does."""
    noise_scale: float = 0.0
    """Report the gradient noise scale in tokens, averaged with this decay, such as 0.99; 0 does not. Needs accumulate."""
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
    start_with: Literal["state", "params"] = "state"
    """With start_from: take the whole state and go on, or only the parameters and begin anew (always so with LoRA)."""
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
    optim: Optim = field(default_factory=Optim)
    """The optimizer."""
    schedule: Schedule = field(default_factory=Schedule)
    """The learning rate over the run."""
    growth: Growth = field(default_factory=Growth)
    """Batch size and sequence length that grow during the run."""
    recipe: Recipe = field(default_factory=Recipe)
    """How a step computes."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the processes divide the work."""
    lora: Lora = field(default_factory=Lora)
    """Train low-rank changes only."""
    run: Run = field(default_factory=Run)
    """Where the run lives, how long it is, what it reports."""
    nproc: int = 0
    """Start this many processes on this machine, as torchrun would. 0: this process is all, or torchrun started it."""
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
        for name, size in (
            ("--recipe.batch-size", r.batch_size),
            *(("--growth.batch-sizes", s) for s in self.growth.batch_sizes),
        ):
            if size % r.accumulate:
                raise ValueError(
                    f"--recipe.accumulate {r.accumulate} does not divide {name} {size}; choose one of {divisors(size)}"
                )
        if r.noise_scale and r.accumulate < 2:
            raise ValueError("--recipe.noise-scale compares the parts of a batch; give it --recipe.accumulate 2 or more")
        if not 0 <= r.ema < 1:
            raise ValueError(f"--recipe.ema {r.ema} is no decay; it must be at least 0 and below 1")
        self.optim.check()
        check_numbers(self, SIGNED)

    def check_processes(self, processes: int) -> None:
        """Raise ValueError, in one line with the arithmetic, unless so many processes can share the work."""
        mesh, r = self.mesh.on(processes), self.recipe
        for size in (*self.growth.batch_sizes, r.batch_size):
            check_layout(self.model, mesh, self.mesh, size, r.sequence_length, r.accumulate)
            parts = self.mesh.pp_microbatches or 2 * mesh.pp
            rows = size // (r.accumulate * mesh.dp_replicate * mesh.dp_shard)
            if mesh.pp > 1 and rows % parts:
                raise ValueError(
                    f"--mesh.pp-microbatches {parts} does not divide the {rows} sequences that a pipeline gets "
                    f"(--recipe.batch-size {size}); choose one of {divisors(rows)}"
                )
