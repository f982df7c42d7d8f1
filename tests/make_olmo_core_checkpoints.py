"""Make tests/fixtures/olmo_core with the real ai2-olmo-core, in environments of its own:

    python tests/make_olmo_core_checkpoints.py [--python3 PYTHON] [--python2 PYTHON] [--only NAME]

``--python3`` and ``--python2``: interpreters that have ai2-olmo-core 3.0.0 and 2.4.0; without them two environments are made in
a temporary folder. Each case is a run of four steps of its `Trainer` on a file of tokens, saved after the third and the fourth,
so that a test can import the third, make a step, and compare with the fourth. What OLMo-core itself reads in its checkpoints,
and the logits that it computes, are written beside them; so the tests need no OLMo-core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures" / "olmo_core"
LENGTH, BATCH, VOCABULARY = 16, 4, 64
CASES = {  # name: version of OLMo-core, ranks
    "olmo2": (3, 1),
    "olmo2-gqa-fsdp": (3, 2),
    "olmo3-2.x": (2, 1),
    "pre-norm-tied": (3, 1),
}


def model_config(case: str) -> Any:
    """OLMo-core's config of a model of some thousand parameters."""
    from olmo_core.nn.attention import SlidingWindowAttentionConfig
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerBlockType, TransformerConfig

    options: dict[str, Any] = {
        "olmo2": {"n_heads": 2},
        "olmo2-gqa-fsdp": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 4},
        "olmo3-2.x": {"n_heads": 2, "sliding_window": SlidingWindowAttentionConfig([3, 5, -1], False, True), "n_layers": 3},
        "pre-norm-tied": {"n_heads": 2, "block_name": TransformerBlockType.default},
    }[case]
    made = TransformerConfig.llama_like(
        **{
            "d_model": 8,
            "vocab_size": VOCABULARY,
            "n_layers": 2,
            "qk_norm": True,
            "layer_norm_eps": 1e-6,
            "feed_forward": FeedForwardConfig(hidden_size=12, bias=False),
            "block_name": TransformerBlockType.reordered_norm,
            **options,
        }
    )
    if case == "pre-norm-tied":
        made.tie_word_embeddings = True
    return made


def train_module_config(case: str) -> Any:
    """OLMo-core's config of a step; the cases have different optimizers and schedules."""
    from olmo_core.config import DType
    from olmo_core.distributed.parallel import DataParallelType
    from olmo_core.optim import WSD, AdamWConfig, CosWithWarmup, OptimGroupOverride, SkipStepAdamWConfig
    from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig

    spared = [OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.0})]
    shared = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    adamw, skipping = AdamWConfig(**shared), SkipStepAdamWConfig(**shared, group_overrides=spared)
    cosine, wsd = CosWithWarmup(warmup=2), WSD(warmup=2, decay=3, decay_fraction=None, warmup_min_lr=1e-3)
    ranks = CASES[case][1]
    fsdp = TransformerDataParallelConfig(name=DataParallelType.fsdp, reduce_dtype=DType.float32) if ranks > 1 else None
    return TransformerTrainModuleConfig(
        rank_microbatch_size=LENGTH * BATCH // ranks,
        max_sequence_length=LENGTH,
        optim=adamw if case in ("olmo2", "pre-norm-tied") else skipping,
        scheduler=cosine if case != "olmo2-gqa-fsdp" else wsd,
        max_grad_norm=1.0,
        z_loss_multiplier=1e-4 if case == "olmo2" else None,
        dp_config=fsdp,
    )


def train(case: str, out: Path, tokens: Path) -> None:
    """Four of ten steps, in this process or in this rank."""
    from dataclasses import dataclass

    from olmo_core.config import Config
    from olmo_core.data import NumpyDataLoaderConfig, NumpyFSLDatasetConfig, TokenizerConfig
    from olmo_core.nn.transformer import TransformerConfig
    from olmo_core.train import Duration, TrainerConfig, prepare_training_environment, teardown_training_environment
    from olmo_core.train.callbacks import CheckpointerCallback, ConfigSaverCallback
    from olmo_core.train.train_module import TransformerTrainModuleConfig

    @dataclass
    class Experiment(Config):
        model: TransformerConfig
        dataset: NumpyFSLDatasetConfig
        data_loader: NumpyDataLoaderConfig
        train_module: TransformerTrainModuleConfig
        trainer: TrainerConfig
        init_seed: int = 12536

    prepare_training_environment(seed=1, backend="gloo" if CASES[case][1] > 1 else None)
    work = str(out / "work")
    cfg = Experiment(
        model_config(case),
        NumpyFSLDatasetConfig(
            tokenizer=TokenizerConfig(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=1),
            paths=[str(tokens)],
            sequence_length=LENGTH,
            work_dir=work,
        ),
        NumpyDataLoaderConfig(global_batch_size=LENGTH * BATCH, seed=34521),
        train_module_config(case),
        TrainerConfig(
            save_folder=str(out / "run"),
            work_dir=work,
            max_duration=Duration.steps(10),
            hard_stop=Duration.steps(4),
            checkpointer=_two_threads(),
        )
        .with_callback("checkpointer", CheckpointerCallback(save_interval=3, save_async=False))
        .with_callback("config_saver", ConfigSaverCallback()),
    )
    module = cfg.train_module.build(cfg.model.build())
    dataset = cfg.dataset.build()
    dataset.prepare()
    loader = cfg.data_loader.build(dataset, dp_process_group=module.dp_process_group)
    trainer = cfg.trainer.build(module, loader)
    config = {**cfg.as_config_dict(), "dataset": {**cfg.dataset.as_config_dict(), "paths": ["tokens.npy"]}}
    trainer.callbacks["config_saver"].config = config
    trainer.fit()
    teardown_training_environment()


def _two_threads() -> Any:
    from olmo_core.train.checkpoint import CheckpointerConfig

    return CheckpointerConfig(save_thread_count=2, load_thread_count=1)


def expected(case: str, out: Path) -> None:
    """What OLMo-core reads: of the third step digests of all bytes, and logits; of the fourth the numbers."""
    import torch
    from olmo_core.distributed.checkpoint import (
        get_checkpoint_metadata,
        load_keys,
        load_model_and_optim_state,
        unshard_checkpoint,
    )
    from olmo_core.nn.transformer import TransformerConfig
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    def tensors(step: int) -> dict[str, Any]:
        folder = out / "run" / f"step{step}" / "model_and_optim"
        described = get_checkpoint_metadata(str(folder)).state_dict_metadata
        keys = [key for key, value in described.items() if isinstance(value, TensorStorageMetadata)]
        return dict(zip(keys, load_keys(str(folder), keys), strict=True))

    third = {name: {"shape": list(x.shape), "sha256": _digest(x)} for name, x in tensors(3).items()}
    config = json.loads((out / "run" / "step3" / "config.json").read_text())
    model = TransformerConfig.from_dict(config["model"]).build()
    load_model_and_optim_state(str(out / "run" / "step3" / "model_and_optim"), model)
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model.eval()(ids)
    save_file({"ids": ids, "logits": logits.contiguous(), **tensors(4)}, out / "expected.safetensors")
    (out / "expected.json").write_text(json.dumps(third, indent=1) + "\n")
    if case == "olmo2":
        for kind, safe in (("safetensors", True), ("pt", False)):
            folder = out / f"unsharded-{kind}"
            unshard_checkpoint(str(out / "run" / "step3" / "model_and_optim"), str(folder), use_safetensors=safe, quiet=True)
            shutil.copy(out / "run" / "step3" / "config.json", folder)


def _digest(x: Any) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


def pack(case: str, out: Path) -> None:
    """The checkpoint of the third step, and what is expected, as one file, without dates and owners."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
        return info

    for path in ("run/step0", "run/step4", "work"):
        shutil.rmtree(out / path)
    with tarfile.open(FIXTURES / f"{case}.tar.xz", "w:xz") as archive:
        for path in sorted(out.rglob("*")):
            if path.is_file():
                archive.add(path, path.relative_to(out), filter=plain)


def environments(args: argparse.Namespace, folder: Path) -> dict[int, str]:
    """The interpreters of the two versions."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    from compare import peer_python

    found = {3: args.python3 or peer_python(folder / "3")}
    if args.python2:
        return {**found, 2: args.python2}
    python = folder / "2" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(folder / "2")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "torch>=2.13,<2.14", "ai2-olmo-core==2.4.0"], check=True)
    return {**found, 2: str(python)}


def main() -> None:
    """Make all cases, or one; in an environment of OLMo-core, one part of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python3", default="", help="interpreter with ai2-olmo-core 3.0.0")
    parser.add_argument("--python2", default="", help="interpreter with ai2-olmo-core 2.4.0")
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--part", choices=("train", "expected"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "train":
        train(args.only, args.out, args.out / "tokens.npy")
    elif args.part == "expected":
        expected(args.only, args.out)
    else:
        import numpy as np

        FIXTURES.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            pythons = environments(args, Path(folder))
            for case in [args.only] if args.only else CASES:
                version, ranks = CASES[case]
                out = Path(folder) / case
                out.mkdir()
                tokens = np.random.default_rng(3).integers(2, VOCABULARY, 32 * LENGTH).astype(np.uint8)
                tokens[::37] = 0
                tokens.tofile(out / "tokens.npy")
                launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
                for part, start in (("train", launch), ("expected", [])):
                    words = [__file__, "--part", part, "--only", case, "--out", str(out)]
                    subprocess.run([pythons[version], *start, *words], check=True)
                pack(case, out)


if __name__ == "__main__":
    main()
