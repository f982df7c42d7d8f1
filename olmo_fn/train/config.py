"""A training run as one value. Every field is a command-line flag, and its docstring is the help. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import gcd
from typing import Annotated, Literal

import tyro

from olmo_fn.data.instances import InstancesSettings
from olmo_fn.data.instances.kinds import KINDS
from olmo_fn.data.settings import Data
from olmo_fn.fields import AT_LEAST_ONE, DECAY, INVISIBLE, PATH, SIGNED, VISIBLE, Range, check_values
from olmo_fn.formats.config_json import json_of
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models.config import Model
from olmo_fn.models.settings.attention import Attention
from olmo_fn.models.settings.block import BLOCKS, Block
from olmo_fn.models.settings.feed_forward import FEED_FORWARDS
from olmo_fn.models.settings.gated_delta import GatedDelta
from olmo_fn.models.settings.moe import MoE
from olmo_fn.models.settings.norm import NORMS, NormSettings
from olmo_fn.models.settings.rope_scaling import SCALINGS, RopeScaling
from olmo_fn.models.settings.sublayer import FeedForwardSettings, MixerSettings, divisors
from olmo_fn.train.check_mesh import check_layout
from olmo_fn.train.choices import Choices, named
from olmo_fn.train.environment import check_device
from olmo_fn.train.loss import LOSSES, CrossEntropy, LossSettings
from olmo_fn.train.observers import NoObserver, Observe, ObserverSettings
from olmo_fn.train.optimizers import OPTIMIZERS, AdamW, OptimizerSettings
from olmo_fn.train.schedule import total
from olmo_fn.train.schedules import SCHEDULES, Cosine, ScheduleSettings

CHOICES: Choices = {
    OptimizerSettings: named(*OPTIMIZERS),
    ScheduleSettings: named(*SCHEDULES),
    LossSettings: named(*LOSSES),
    NormSettings: named(*NORMS),
    RopeScaling: named(*SCALINGS),
    MixerSettings: named(Attention, GatedDelta),
    FeedForwardSettings: named(*FEED_FORWARDS, MoE),
    Block: named(*BLOCKS),
    InstancesSettings: named(*KINDS),
    ObserverSettings: named(NoObserver),
}
"""What the fields of a `Config` may hold; the first of each is its default."""


MOST = 10**14  # parameters


@dataclass(frozen=True)
class Growth:
    """Batch size and sequence length that grow to those of the recipe during the run."""

    batch_sizes: Annotated[tuple[int, ...], AT_LEAST_ONE] = ()
    """Smaller batch sizes to begin with, in order; then recipe.batch_size."""
    until: tuple[int, ...] = ()
    """For each of them the step, or number of tokens, at which the next one takes over."""
    units: Literal["steps", "tokens"] = "steps"
    """Unit of `until`."""
    sqrt_lr: bool = False
    """Multiply the rate by √(batch size / first batch size): for Adam and its kin; optim.lr is the first batch's."""
    min_length: int = 0
    """Sequence length to begin with; from there it grows in a line. 0: recipe.sequence_length throughout."""
    length_steps: Annotated[int, AT_LEAST_ONE] = 2000
    """Steps over which the sequence length grows."""
    length_multiple: Annotated[int, AT_LEAST_ONE] = 128
    """Sequence lengths are multiples of this."""
    truncate: bool = False
    """Train on the beginning of each window only, instead of on all of it in shorter sequences."""


@dataclass(frozen=True)
class Lora:
    """Train low-rank changes of some matrices, and nothing else (LoRA)."""

    rank: Annotated[int, Range(0, 1 << 20)] = 0
    """Rank of the changes; 0 trains the whole model."""
    alpha: float = 16.0
    """The change is multiplied by alpha / rank."""
    patterns: tuple[str, ...] = ("*.attention.w_*", "*.feed_forward.w_*")
    """Patterns of the matrices to adapt."""


@dataclass(frozen=True)
class Init:
    """Where the first weights come from, if they are not random."""

    from_hf: Annotated[str, PATH] = ""
    """Directory in the form of Hugging Face (config.json and safetensors) with weights of this model. Without a preset the
    model is that of the directory, and in any case the tokenizer, unless --data.tokenizer names one."""


@dataclass(frozen=True)
class Export:
    """Directories in the form of Hugging Face, written while the run goes on."""

    hf_every: int = 0
    """Steps between them; one is written at the end as well. They are made from checkpoints, which are saved then. 0: none."""
    keep_last: int = 0
    """Keep only this many newest ones; 0 keeps all."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of their weights; auto: that of --init.from-hf, or else float32."""
    weights: Literal["params", "ema", "merge"] = "params"
    """The weights; or their moving average, or the mean of the last steps, if the run keeps one."""


@dataclass(frozen=True)
class Recipe:
    """How a step computes: these fields change the numbers, except those that are marked invisible."""

    batch_size: Annotated[int, Range(1, 1 << 24)] = 512
    """Sequences a step."""
    sequence_length: Annotated[int, Range(1, 1 << 24)] = 4096
    """Tokens a sequence."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    clip_value: float = 0.0
    """Largest entry of the gradient, before its norm is clipped; 0 turns it off."""
    skip_sigma: float = 6.0
    """Skip a step whose loss or gradient norm is this many deviations above its recent mean; 0 turns it off."""
    skip_steps: tuple[tuple[int, int], ...] = ()
    """Ranges of steps, ends included, whose batches are read and not learned from, such as 100 120."""
    ema: Annotated[float, DECAY] = 0.0
    """Decay of an exponential moving average of the weights; 0 keeps none."""
    merge_last: int = 0
    """Keep the mean of the weights over this many steps up to each multiple of merge_every; 0 keeps none."""
    merge_every: Annotated[int, AT_LEAST_ONE] = 1000
    """Steps between the ends of such means."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    normalize: bool = False
    """Keep the rows of all matrices at length 1, as nGPT does."""
    noise_scale: float = 0.0
    """Report the gradient noise scale in tokens, averaged with this decay, such as 0.99; 0 does not. Needs accumulate."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is bfloat16 where the processor multiplies it natively. Parameters are fp32 always."""
    float8: Literal["none", "rowwise", "mx"] = "none"
    """Multiply by the blocks' matrices in float8: rowwise with a scale for each row, mx (MXFP8) for each 32 entries. For GPUs
    from Ada and Hopper on, mx from Blackwell on; a CPU emulates both, slowly."""
    float8_skip: tuple[str, ...] = ()
    """Patterns of matrices to leave out of it, such as "blocks.0.*"."""
    accumulate: Annotated[int, Range(1, 1 << 24), INVISIBLE] = 1
    """Parts in which a batch is computed, to save memory (invisible)."""
    micro_batch: Annotated[int, INVISIBLE] = 0
    """Most sequences that a process computes at once: accumulate is then as small as that allows. 0: accumulate says it, as
    --mesh.pp-microbatches does in a pipeline (invisible)."""
    remat: Annotated[str, INVISIBLE] = "none"
    """Activations to compute again instead of keeping: none; selective, all of a block but its attention; feed_forward;
    full; every-2, … (invisible)."""
    offload: Annotated[bool, INVISIBLE] = False
    """Keep in host memory what remat keeps of each block (invisible)."""
    engine: Annotated[Literal["tape", "func"], INVISIBLE] = "tape"
    """Gradient engine: a sweep over stages, or torch.func (invisible)."""
    attention: Annotated[Literal["auto", "cudnn", "flash", "flash-attn", "flex", "tiles"], INVISIBLE] = "auto"
    """What computes attention; auto is the fastest that can do it here: on a CPU tiles, on a GPU cuDNN or FlashAttention,
    with soft-capped scores FlexAttention. flash is torch's own, flash-attn the package (invisible but for rounding)."""
    compile: Annotated[bool, INVISIBLE] = True
    """Compile every stage; the first start takes longer (invisible)."""
    capture: Annotated[bool, INVISIBLE] = False
    """Launch each step as one CUDA graph: for models so small that a GPU waits for its host, below 400M or so (invisible)."""


@dataclass(frozen=True)
class Run:
    """Where a run lives, how long it is, and what it reports."""

    folder: Annotated[str, PATH] = ""
    """Where everything goes; runs/<preset> when not given."""
    steps: Annotated[int, AT_LEAST_ONE, VISIBLE] = 1000
    """Steps in all."""
    seed: Annotated[int, SIGNED, VISIBLE] = 0
    """Seed of the initial weights."""
    resume: bool = True
    """Go on from the newest whole checkpoint of the folder, if it has one; --run.no-resume demands an empty folder."""
    accept_changes: bool = False
    """Go on though the data, or the config, is not that of the run in the folder; for this start only."""
    start_from: Annotated[str, PATH, VISIBLE] = ""
    """Checkpoint, or run folder, of another run whose state this run starts from."""
    start_with: Annotated[Literal["state", "params"], VISIBLE] = "state"
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
    threads: Annotated[int, Range(0, 1024)] = 0
    """CPU threads; 0 leaves it to torch (all cores)."""
    device: str = "auto"
    """Device to train on: auto takes cuda when there is one."""
    stall_timeout: Annotated[int, Range(1, 10**7)] = 1800
    """Seconds that processes wait for one that does not come, or stands still, before the job ends; a line names it before."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    model: Model
    """Shape of the model."""
    data: Data = field(default_factory=Data)
    """What it learns from."""
    loss: LossSettings = field(default_factory=CrossEntropy)
    """What is minimised."""
    optim: OptimizerSettings = field(default_factory=AdamW)
    """The optimizer."""
    schedule: ScheduleSettings = field(default_factory=Cosine)
    """The learning rate over the run."""
    growth: Growth = field(default_factory=Growth)
    """Batch size and sequence length that grow during the run."""
    recipe: Recipe = field(default_factory=Recipe)
    """How a step computes."""
    mesh: Annotated[MeshConfig, INVISIBLE] = field(default_factory=MeshConfig)
    """How the processes divide the work."""
    lora: Lora = field(default_factory=Lora)
    """Train low-rank changes only."""
    init: Init = field(default_factory=Init)
    """First weights that are not random."""
    export: Annotated[Export, INVISIBLE] = field(default_factory=Export)
    """Directories in the form of Hugging Face on the way."""
    run: Annotated[Run, INVISIBLE] = field(default_factory=Run)
    """Where the run lives, how long it is, what it reports."""
    observe: Annotated[Observe, INVISIBLE] = field(default_factory=Observe)
    """Who looks on: trackers, a profiler, alarms."""
    use: Annotated[tuple[str, ...], INVISIBLE, tyro.conf.arg(metavar="FILE")] = ()
    """A Python file, or a module, with optimizers, schedules, losses, … of your own to choose from, and presets in its CONFIGS;
    may be given several times."""
    nproc: Annotated[int, Range(0, 1024), INVISIBLE] = 0
    """Start this many processes on this machine, as torchrun would. 0: this process is all, or torchrun started it."""
    dry_run: Annotated[bool, INVISIBLE] = False
    """Only print the resolved config, counts, the sharding plan, and memory, traffic and time a rank; read no data,
    allocate no weights."""
    gpus: Annotated[int, Range(0, 1 << 18), INVISIBLE] = 0
    """Only for --dry-run: processes there would be. 0: the product of the degrees of --mesh that are given."""
    gpu: Annotated[Literal["a100", "h100", "h200", "b200", "mi300x"], INVISIBLE] = "h100"
    """Only for --dry-run: the accelerator that memory and time are estimated for."""
    skew: Annotated[float, Range(1, 1 << 16), INVISIBLE] = 1.0
    """Only for --dry-run: over --mesh.ep, plan the process that has so many times the even number of tokens for its experts."""

    def check(self) -> None:
        """Raise ValueError, in one line with the fix, if the numbers do not fit together."""
        check_values(self)
        self.model.check()
        m = self.model
        if m.d_model * (m.vocab_size + m.n_layers * m.d_model) > MOST:
            sizes = f"--model.d-model {m.d_model}, --model.n-layers {m.n_layers} and --model.vocab-size {m.vocab_size}"
            raise ValueError(f"{sizes} make more than {MOST:.0e} parameters; make the model smaller")
        check_device("--run.device", self.run.device)
        self.schedule.check(self.optim.lr, total(self))
        r = self.recipe
        for name, size in (
            ("--recipe.batch-size", r.batch_size),
            *(("--growth.batch-sizes", s) for s in self.growth.batch_sizes),
        ):
            if size % r.accumulate:
                raise ValueError(
                    f"--recipe.accumulate {r.accumulate} does not divide {name} {size}; choose one of {divisors(size)}"
                )
        if self.init.from_hf and self.run.start_from:
            raise ValueError("--init.from-hf and --run.start-from both say where the weights come from; leave out one of them")
        if self.init.from_hf and not self.data.paths and not self.dry_run:
            raise ValueError(
                f"--init.from-hf needs --data.paths, files that its tokenizer made: olmo-fn tokenize TEXTS --output tokens "
                f"--tokenizer {self.init.from_hf}/tokenizer.json"
            )
        if self.export.hf_every:
            self.check_export()
        if r.noise_scale and r.accumulate < 2 and not r.micro_batch:
            raise ValueError("--recipe.noise-scale compares the parts of a batch; give it --recipe.accumulate 2 or more")

    def check_export(self) -> None:
        """ValueError, with the flags, for weights that are not kept, and a model that no architecture of transformers has."""
        kept = {"ema": ("--recipe.ema", self.recipe.ema), "merge": ("--recipe.merge-last", self.recipe.merge_last)}
        flag, value = kept.get(self.export.weights, ("", 1))
        if not value:
            raise ValueError(f"--export.weights {self.export.weights} are not kept; give {flag}, or leave the weights out")
        try:
            json_of(self.model)
        except ValueError as error:
            raise ValueError(f"--export.hf-every {self.export.hf_every}: {error}") from None

    def on(self, processes: int) -> Config:
        """With the ``recipe.accumulate`` that ``recipe.micro_batch`` asks for on so many processes; ValueError for another."""
        r, mesh = self.recipe, self.mesh.on(processes)
        if not r.micro_batch or mesh.pp > 1:
            return self
        rows = [size // mesh.degree("data") for size in (*self.growth.batch_sizes, r.batch_size)]
        common = max(1, gcd(*rows))
        parts = next(d for d in range(1, common + 1) if common % d == 0 and (max(rows) <= d * r.micro_batch or d == common))
        if r.accumulate not in (1, parts):
            raise ValueError(
                f"--recipe.micro-batch {r.micro_batch} makes {parts} parts of the {max(rows)} sequences of a process, "
                f"--recipe.accumulate {r.accumulate}; leave one of them out"
            )
        return replace(self, recipe=replace(r, accumulate=parts))

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
