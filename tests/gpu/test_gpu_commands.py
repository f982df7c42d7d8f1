"""Every command on a GPU that is emulated: none mixes devices, and each says what it says on a CPU."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
from traced import command

from olmo_fn.data.tokenizer import byte_level
from olmo_fn.testing import FakeCuda, Seen
from olmo_fn.train.observers import read_metrics

DEVICES = {"host": "cpu", "cuda": "cuda"}
"""The device of each run; their names are alike in length, so that tables are."""
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


class Commands:
    """Commands in the process with the GPU, on the data of one folder."""

    def __init__(self, process: FakeCuda, folder: Path) -> None:
        self.process, self.folder = process, folder
        byte_level().save(folder / "tokenizer.json")
        text = Path(textwrap.__file__).read_text()
        np.array(byte_level().encode(text), np.uint16).tofile(folder / "tokens.npy")
        (folder / "text.txt").write_text(text[:500])
        (folder / "prompts.txt").write_text("def \nimport re\n")

    def __call__(self, *words: object, typed: str = "", code: int = 0) -> tuple[str, Seen]:
        found, said, errors, seen = self.process.run(command, [*map(str, words)], typed)
        assert found == code, errors
        return said, seen

    def train(self, name: str, *words: object, device: str = "cuda", steps: int = 4) -> Seen:
        model = {"d-model": 32, "n-layers": 1, "vocab-size": 257, "n-heads": 2}
        data = {"paths": self.folder / "tokens.npy", "dtype": "uint16", "tokenizer": self.folder / "tokenizer.json"}
        run = {
            "folder": self.folder / name,
            "device": device,
            "steps": steps,
            "checkpoint-every": 2,
            "threads": 1,
            "sample": "",
        }
        recipe = {"batch-size": 2, "sequence-length": 32, "dtype": "float32"}
        flags = {"model": model, "data": data, "run": {**run, "eval-every": 2, "eval-tokens": 100}, "recipe": recipe}
        given = [word for group, values in flags.items() for name, x in values.items() for word in (f"--{group}.{name}", x)]
        return self("train", "olmo2-tiny", *given, "--recipe.no-compile", "--schedule.warmup", 1, *words)[1]

    def losses(self, name: str) -> list[float]:
        return [line["loss"] for line in read_metrics(self.folder / name / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def commands(fake_cuda: FakeCuda, tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """With two runs, one on each device."""
    found = Commands(fake_cuda, tmp_path_factory.mktemp("gpu"))
    for name, device in DEVICES.items():
        found.train(name, "--recipe.ema", 0.9, "--recipe.accumulate", 2, device=device)
        (found.folder / name / "chat_template.jinja").write_text(TEMPLATE)
    return found


def on_both(commands: Commands, *words: object, typed: str = "") -> str:
    """What a command says of the run on the GPU, there; the same as of that on the CPU.

    ``RUN`` and ``DEVICE`` stand for the run's name and its device.
    """
    said = []
    for name, device in DEVICES.items():
        given = [str(word).replace("RUN", name).replace("DEVICE", device) for word in words]
        said.append(commands(*given, typed=typed)[0].replace(f"{name}", "RUN"))
    assert said[0] == said[1]
    return said[1]


def test_training(commands: Commands):
    losses = commands.losses("cuda")
    assert len(losses) >= 4
    assert losses == pytest.approx(commands.losses("host"), rel=1e-6)


def test_going_on(commands: Commands):
    seen = commands.train("cuda-more", "--run.start-from", commands.folder / "cuda", "--recipe.ema", 0.9, steps=6)
    assert len(commands.losses("cuda-more")) >= 2
    assert seen.launched


def test_lora(commands: Commands):
    for name, device in DEVICES.items():
        commands.train(f"lora-{name}", "--run.start-from", commands.folder / "cuda", "--lora.rank", 2, device=device)
    assert commands.losses("lora-cuda") == pytest.approx(commands.losses("lora-host"), rel=1e-6)


def test_evaluate(commands: Commands):
    said = on_both(commands, "evaluate", commands.folder / "RUN", commands.folder / "text.txt", "--device", "DEVICE")
    assert "bits per byte" in said


@pytest.mark.parametrize("how", [(), ("--weights", "ema", "--temperature", 0, "--dtype", "bfloat16")])
def test_generate(commands: Commands, how: tuple[object, ...]):
    words = ("--device", "DEVICE", "--max-tokens", 8, "--prompts-file", commands.folder / "prompts.txt")
    assert "import re" in on_both(commands, "generate", commands.folder / "RUN", *words, *how)


def test_chat(commands: Commands):
    words = ("--device", "DEVICE", "--max-tokens", 8)
    assert on_both(commands, "chat", commands.folder / "RUN", *words, typed="hello\nand more\n")


def test_replay(commands: Commands):
    commands("replay", commands.folder / "cuda", "--step", 3)  # it would end with 1 if a bit were another


def test_average(commands: Commands):
    on_both(commands, "average", commands.folder / "RUN", "--output", commands.folder / "average-RUN")


def test_checkpoints(commands: Commands):
    assert commands("checkpoint", commands.folder / "cuda")[0].count("whole") == 2


def test_export(commands: Commands):
    on_both(commands, "convert", "to-hf", commands.folder / "RUN", commands.folder / "hf-RUN")
    commands("generate", commands.folder / "hf-cuda", "def ", "--device", "cuda", "--max-tokens", 8)
