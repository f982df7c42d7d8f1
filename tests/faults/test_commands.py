"""What is typed wrong, or cannot be read or written, is answered in one line with exit code 2: a table, and a seeded fuzz."""

import errno
import json
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import tyro
from programs import ROOT

import train
from olmo_fn.cli import errors, process, training
from olmo_fn.cli import main as cli
from olmo_fn.cli.training import overview
from olmo_fn.models.count import num_params
from olmo_fn.planner import fit, search, tables
from olmo_fn.planner.plan_input import plan_input
from olmo_fn.presets import CONFIGS
from olmo_fn.train.config import Config
from olmo_fn.train.folder import read_config, write_config

TINY = CONFIGS["olmo2-tiny"]
LONG = "x" * 5000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the runs ``runs/a`` and ``runs/b``, which have no checkpoints, and broken configs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("a", "b"):
        write_config(replace(TINY, run=replace(TINY.run, folder=f"runs/{name}")), Path("runs", name))
    for name, text in CONFIG_FILES.items():
        Path(name).write_bytes(text)
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("folder.yaml").mkdir()
    return tmp_path


CONFIG_FILES = {
    "deep.yaml": b"[" * 100_000,
    "dashes.yaml": b"- " * 100_000,
    "nested.yaml": b"{a: " * 3_000 + b"1" + b"}" * 3_000,
    "many.yaml": b"".join(b"key%d: 1\n" % i for i in range(20_000)),
    "twice.yaml": b"run: {}\n" * 2,
    "latin.yaml": b"run: {sample: '\xe4'}\n",
    "zero.yaml": bytes(100),
    "empty.yaml": b"",
    "broken.py": b"import os\nnothing\n",
    "syntax.py": b"def f(:\n",
}


def answer(words, capsys, prog="train.py"):
    """The exit code of a command, and what it writes on stderr."""
    code = train.main([*words]) if prog == "train.py" else cli.main([prog, *words])
    return code, capsys.readouterr().err


# --- one line for what was typed ----------------------------------------------------------------------------------------

T = "olmo2-tiny"
TYPED = {
    "use-9-lr": ([T, "--lr", "1e-3"], "--lr: did you mean --optim.lr?"),
    "use-9-preset": (["olmo2-tny"], "'olmo2-tny' is no preset, and no run's config.yaml or folder, did you mean olmo2-tiny?"),
    "use-4-step": ([T, "--run.step", "5"], "--run.step: did you mean --run.steps?"),
    "use-4-number": ([T, "--optim.lr", "abc"], "--optim.lr: 'abc' is no number; see train.py olmo2-tiny --help"),
    "use-4-whole-number": ([T, "--run.steps", "1e3"], "--run.steps: '1e3' is no whole number; write 1000;"),
    "use-4-value": ([T, "--optim.lr"], "--optim.lr needs a value after it"),
    "use-4-choice": ([T, "--recipe.dtype", "fp16"], "--recipe.dtype 'fp16' is unknown; There are auto, float32, bfloat16"),
    "use-4-word": ([T, "adamw"], "'adamw' is not understood"),
    "use-4-no-preset": (["--optim.lr", "1e-3"], "the preset comes first: train.py olmo2-tiny --optim.lr 1e-3"),
    "use-4-preset-last": (["--optim.lr", "1e-3", "olmo2-1b"], "the preset comes first: train.py olmo2-1b --optim.lr 1e-3"),
    "use-4-underscore": (["olmo2_tiny"], "did you mean olmo2-tiny?"),
    "use-4-config": (["runs/x/config.yaml"], "'runs/x/config.yaml' is not there; there are runs/a, runs/b"),
    "use-4-run": (["runs/x"], "'runs/x' is not there; there are runs/a, runs/b"),
    "use-4-length": ([T, "--recipe.sequence-length", "1000000000"], "--recipe.sequence-length is 1000000000; it must be at"),
    "use-4-warmup": ([T, "--run.steps", "2"], "--schedule.warmup 30 is longer than the whole schedule of 2; give --schedule"),
    "ranks-2-warmup": ([T, "--nproc", "3", "--mesh.tp", "3", "--run.steps", "20"], "--schedule.warmup 30 is longer than"),
    "reports-56": (["olmo2-1b", "--run.steps", "100"], "--schedule.warmup 2000 is longer than the whole schedule of 100"),
    "use-4-other-class": ([T, "--optim.rank", "1"], "--optim.rank: dion has it, choose that with --optim.name dion"),
    "use-3-group": ([T, "--help", "optm"], "--help optm: there is no such group of flags, did you mean optim?"),
    "reliability-15-threads": (
        [T, "--run.threads", "100000"],
        "--run.threads is 100000; it must be at least 0 and at most 1,024",
    ),
    "reliability-15-threads-31": ([T, "--run.threads", "2147483648"], "--run.threads is 2147483648"),
    "reliability-15-device": ([T, "--run.device", "meta"], "--run.device 'meta' is no device to compute on"),
    "reliability-15-width-32": ([T, "--model.d-model", "4294967296"], "--model.d-model is 4294967296"),
    "reliability-15-width-63": ([T, "--model.d-model", "9223372036854775807"], "--model.d-model is 9223372036854775807"),
    "reliability-15-layers": ([T, "--model.n-layers", "1000000"], "--model.n-layers is 1000000"),
    "reliability-15-product": (
        [T, "--model.d-model", "16777216", "--model.n-heads", "4", "--model.vocab-size", "2000000000"],
        "--model.d-model 16777216, --model.n-layers 4 and --model.vocab-size 2000000000 make more than",
    ),
    "reliability-15-merge": ([T, "--recipe.merge-last", "5", "--recipe.merge-every", "0"], "--recipe.merge-every is 0"),
    "reliability-15-multiple": ([T, "--growth.length-multiple", "0"], "--growth.length-multiple is 0"),
    "reliability-15-growth": (
        [T, "--growth.min-length", "2", "--growth.length-multiple", "1", "--recipe.sequence-length", "1048576"],
        "--growth.length-multiple 1 makes 1,048,576 lengths of --recipe.sequence-length 1048576; take 1024 or more",
    ),
    "reliability-15-sample": ([T, "--run.sample", "\udcff"], "--run.sample is '\\udcff', which is not UTF-8"),
    "reliability-15-digits": ([T, "--run.steps", "9" * 5000], "--run.steps: "),
    "reliability-15-echo": ([T, "--optim.name", LONG], "xxxx… (5,002 characters)"),
    "reliability-15-long-flag": ([T, f"--{LONG}", "1"], "xxxx… (5,0"),
    "reliability-15-escape": ([T, "--optim.name", "\x1b[31mred"], "--optim.name '\\x1b[31mred' is unknown"),
    "reliability-19-deep": (["deep.yaml"], "deep.yaml: not a config: it is nested too deeply"),
    "reliability-19-dashes": (["dashes.yaml"], "dashes.yaml: not a config: it is nested too deeply"),
    "reports-07-nested": (["nested.yaml"], "nested.yaml: not a config: it is nested too deeply"),
    "reliability-19-many": (["many.yaml"], "many.yaml: "),
    "reliability-19-twice": (["twice.yaml"], "twice.yaml: not YAML, line 2: run is given twice"),
    "reliability-11-encoding": (["latin.yaml"], "latin.yaml: it is not UTF-8, at byte 15"),
    "reliability-10-zero": (["zero.yaml"], "zero.yaml: "),
    "reliability-10-empty": (["empty.yaml"], "empty.yaml: "),
    "reliability-12-loop": (["loop.yaml"], "'loop.yaml' is not there"),
    "reliability-11-folder": (["folder.yaml"], "'folder.yaml' is no run folder: there is no config.yaml in it"),
    "reports-14-nobody": ([T, "--run.folder=~nobody-of-that-name/x"], "--run.folder '~nobody-of-that-name/x': Could not"),
    "use-4-start-from": (
        ["olmo2-tiny", "--run.start-from", "runs/a", "--model.d-model", "96", "--model.hidden-size", "64"],
        "--run.start-from 'runs/a' has a model of another shape; add --model.d-model 192 --model.hidden-size 512",
    ),
    "use-broken-file": (["--use", "broken.py", T], "broken.py, line 2: NameError: name 'nothing' is not defined"),
    "use-no-python": (["--use", "syntax.py", T], "syntax.py, line 1: SyntaxError: "),
    "micro-batch-and-accumulate": (
        [T, "--recipe.micro-batch", "1", "--recipe.accumulate", "2"],
        "--recipe.micro-batch 1 makes 4 parts of the 4 sequences of a process, --recipe.accumulate 2; leave one of them out",
    ),
}


@pytest.mark.parametrize("name", TYPED)
def test_what_is_typed_wrong_is_answered_in_one_line(name, folder, capsys):
    words, line = TYPED[name]
    start = time.process_time()
    code, said = answer(words, capsys)
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("error: ")
    assert line in said
    assert len(said) < 3500
    assert (
        time.process_time() - start < 10
    )  # seconds of a processor: nothing is built, or looked for, in proportion to a number


OTHERS = {
    "unknown-flag-before-what-is-missing": ("generate", ["--temprature", "1"], "--temprature: did you mean --temperature?"),
    "missing": ("generate", [], "RUN must be given; see olmo-fn generate --help"),
    "generate-device": ("generate", ["runs/a", "--device", "meta"], "--device 'meta' is no device to compute on"),
    "generate-number": ("generate", ["runs/a", "--temperature", "hot"], "--temperature: 'hot' is no number"),
    "generate-run": (
        "generate",
        ["runs/x"],
        "runs/x is not there; give the folder of a run, or one of its checkpoints; there are",
    ),
    "plan-gpus": ("plan", [T, "--gpus", "1000000000"], "--gpus is 1000000000; it must be at least 0 and at most 262,144"),
    "plan-preset": (
        "plan",
        ["olmo2_7b", "--gpus", "8"],
        "'olmo2_7b' is neither a preset nor a config.yaml; did you mean olmo2-7b?",
    ),
    "pipeline-sizes": (
        "pipeline",
        ["1f1b", "--ranks", "4000", "--microbatches", "60000"],
        "--ranks 4000 x --microbatches 60000",
    ),
    "pipeline-kind": ("pipeline", ["1f2b"], "'1f2b' is unknown, did you mean 1f1b?"),
    "plot-picture": ("plot", ["schedul"], "there is no such picture, did you mean schedule?"),
    "plot-flag": ("plot", ["schedule", "cosine", "--totl", "5"], "--totl: did you mean --total?"),
    "plot-output": ("plot", ["schedule", "cosine", "-o", f"{LONG}.png"], "cannot write"),
    "average-output": ("average", ["runs/a"], "--output must be given"),
    "reliability-15-average": ("average", ["runs/a", "-o", "x" * 400], "File name too long; take a shorter name"),
    "reliability-15-workers": ("tokenize", ["deep.yaml", "--output", "o", "--workers", "9" * 400], "--workers"),
    "checkpoint-nothing": ("checkpoint", ["runs/x"], "runs/x: no such folder"),
    "replay-nothing": ("replay", ["runs/a", "--step", "5"], "runs/a"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_so_do_all_the_other_commands(name, folder, capsys):
    command, words, line = OTHERS[name]
    code, said = answer(words, capsys, command)
    assert (code, said.count("\n")) == (2, 1), said
    assert line in said


SYSTEM = {
    "disk-full": (OSError(errno.ENOSPC, "No space left on device", "runs/a/x"), "'runs/a/x': No space left on device; free"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), "'/srv/x': Permission denied; take another"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/proc/x"), "'/proc/x': Read-only file system; nothing can be"),
    "two-names": (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "cannot use 'b': Invalid cross-device"),
    "no-name": (OSError(errno.EMFILE, "Too many open files"), "Too many open files; raise the limit of open files"),
    "text-alone": (OSError("Corrupt snappy compressed data."), "Corrupt snappy compressed data."),
    "not-utf-8": (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte"), "no utf-8 text: byte 1 is 0xff"),
    "not-ascii": (UnicodeEncodeError("ascii", "a\xe4", 1, 2, "ordinal"), "cannot be written as ascii: character 2"),
    "nested": (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
    "memory": (MemoryError(), "there is not enough memory; make batch"),
    "torch-memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough memory"),
    "zlib": (zlib.error("Error -3 while decompressing data"), "compressed, and damaged: Error -3"),
    "worker": (BrokenProcessPool("A process in the process pool was terminated"), "a worker process died"),
}


@pytest.mark.parametrize("name", SYSTEM)
def test_errors_of_the_system_are_one_line_with_the_path_and_what_to_do(name, capsys):
    error, line = SYSTEM[name]

    def command():
        raise error

    assert process.exit_code(command) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [AssertionError("x"), KeyError("loss"), TypeError("x"), RuntimeError("shapes")])
def test_an_error_of_the_program_itself_keeps_its_traceback(error):
    def command():
        raise error

    with pytest.raises(type(error)):
        process.exit_code(command)
    assert errors.describe(error) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "olmo_fn", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (done.returncode, done.stderr) == (
        2,
        "error: No space left on device; free some space there, or take another folder\n",
    )


# --- signals at any moment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "stopped by SIGTERM\n")])
@pytest.mark.parametrize("after", ["at once", "in an import of torch"])
def test_a_signal_while_it_starts_is_one_line(number, said, after):
    """use-10: in an import, which would hold the exception back or print it, and between imports."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
    )
    code += "from olmo_fn.cli.main import main, run_process\n"
    code += "def command():\n  print('ready', flush=True)\n"
    code += "  import torch\n" if after != "at once" else "  while True: pass\n"
    code += "  while True: pass\nrun_process(command)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3 if after != "at once" else 0)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == said
    assert process.returncode == 128 + number


# --- help ---------------------------------------------------------------------------------------------------------------


def test_help_of_a_group_is_of_that_group_alone(capsys):
    assert train.main(["olmo2-tiny", "--optim.name", "muon", "--help", "optim"]) == 0
    text = capsys.readouterr().out
    assert "--optim.nesterov" in text
    assert "(default: 0.9 0.95)" in " ".join(text.split()).replace("│ │ ", "")
    assert "--run.steps" not in text
    assert text.count("\n") < 60
    assert train.main(["olmo2-tiny", "--help"]) == 0
    whole = capsys.readouterr().out
    assert all(flag in whole for flag in ("--optim.lr", "--run.steps", "--mesh.tp"))
    assert max(map(len, whole.splitlines())) <= 80


def test_presets_are_told_apart_by_what_one_chooses_by():
    text = overview(CONFIGS, "train.py")
    assert max(map(len, text.splitlines())) <= 80
    for name, config in CONFIGS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        number, unit = row.split()[1:3]
        assert float(number) * {"M": 1e6, "B": 1e9}[unit] == pytest.approx(num_params(config.model), rel=6e-3)
        assert f"{config.recipe.batch_size:,} x {config.recipe.sequence_length:,}" in row


BELOW = ["plot schedule", "plot range-test", "plot runs", "data tokenize", "data show", "convert to-hf", "convert upcycle"]


@pytest.mark.parametrize("name", [*(name for name in cli.COMMANDS if name != "train"), *BELOW])
def test_no_help_needs_torch(name):
    code = f"import sys; from olmo_fn.cli.main import main; assert main({[*name.split(), '--help']}) == 0\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120).returncode == 0


# --- paths, micro-batches, the dry run ------------------------------------------------------------------------------------


def test_the_home_folder_stands_for_a_tilde_in_every_path(folder):
    """reports-14; and in no other text."""
    flags = ["--run.folder=~/r", "--run.start-from=~/s", "--data.tokenizer=~/t", "--data.cache-dir=~/c", "--run.sample=~/x"]
    cfg = training.parse(["olmo2-tiny", *flags, "--data.paths", "~/p", "q"], CONFIGS, "train.py")
    home = str(folder / "home")
    assert (cfg.run.folder, cfg.run.start_from, cfg.data.tokenizer, cfg.data.cache_dir) == tuple(f"{home}/{x}" for x in "rstc")
    assert (cfg.data.paths, cfg.run.sample) == ((f"{home}/p", "q"), "~/x")
    Path("own.yaml").write_text("model: {d_model: 8, n_layers: 1}\nrun: {folder: ~/r}\n")
    assert training.parse(["own.yaml"], CONFIGS, "train.py").run.folder == f"{home}/r"


@pytest.mark.parametrize(
    ("words", "processes", "parts"),
    [("--recipe.micro-batch 16", 8, 4), ("--recipe.micro-batch 100", 8, 1), ("--recipe.micro-batch 5", 1, 128),
     ("--recipe.accumulate 4", 8, 4), ("--recipe.micro-batch 16 --recipe.accumulate 4", 8, 4), ("", 8, 32)],
)  # fmt: skip
def test_accumulate_follows_from_the_micro_batch(words, processes, parts):
    cfg = training.parse(["olmo2-1b", *words.split()], CONFIGS, "train.py")
    assert cfg.on(processes).recipe.accumulate == parts
    cfg.on(processes).check_processes(processes)


def test_a_run_goes_on_with_its_micro_batch_on_other_processes(folder):
    cfg = training.parse(["olmo2-1b", "--run.folder", "runs/c"], CONFIGS, "train.py").on(8)
    write_config(cfg, Path("runs/c"))
    assert read_config(Path("runs/c")).recipe.accumulate == cfg.recipe.accumulate == 32
    assert training.parse(["runs/c"], CONFIGS, "train.py").on(4).recipe.accumulate == 64


@pytest.mark.parametrize("name", ["olmo2-7b", "olmo2-13b"])
def test_presets_fit_on_a_node(name):
    """use-14: eight devices of 80 GB, with no flag but their number."""
    answer = tables.report(replace(CONFIGS[name], gpus=8)).splitlines()[:10]
    assert any(line.startswith("fits: ") for line in answer), answer


def test_the_dry_run_and_the_refusal_of_a_run_give_the_same_advice():
    cfg = training.parse(["olmo2-30m", "--recipe.accumulate", "1", "--gpu", "a100"], CONFIGS, "train.py")
    advice = re.search(r"^try (--.*), which takes", "\n".join(tables.report(cfg).splitlines()[:10]), re.M)[1]
    found = plan_input(cfg)
    with pytest.raises(ValueError, match=f"This fits: {advice}$"):
        fit.check_memory(cfg, found.mesh, found.dtype, 80e9 - 4e9 + fit.PROCESS)


def test_no_time_is_below_zero():
    assert "-0.000" not in tables.report(TINY)


def test_lora_on_random_weights_is_said(folder, capsys):
    """use-2; the run ends behind the warning, for its layout cannot be."""
    code, said = answer(["olmo2-tiny", "--lora.rank", "8", "--nproc", "2", "--mesh.tp", "2"], capsys)
    assert code == 2
    assert said.startswith(
        "warning: --lora.rank trains adapters of random weights here; give --run.start-from RUN or --init.from-hf DIR\n"
    )


@pytest.mark.parametrize(
    ("losses", "total", "words"),
    [
        ([5, 5, 4.8, 4.0, 3.0, 2.8, 2.9, 5.0], 8, "falls fastest at 1.00e-03 and is lowest at "),
        (
            [5, 5, 4.8, 4.0, 3.0, 2.0],
            100,
            "is still falling at the end, 1.00e-02, and the test has done 6 of its 100 steps; finish it",
        ),
        ([5, 5, 4.8, 4.0, 3.0, 2.0], 6, "is still falling at the end, 1.00e-02, and the test is done; raise --optim.lr"),
    ],
    ids=["whole", "unfinished", "too-low"],
)
def test_a_range_test_that_never_reached_its_edge_says_so(losses, total, words, folder, capsys):
    """use-2; lines that are no metrics are passed over."""
    write_config(replace(TINY, run=replace(TINY.run, steps=total)), Path("runs/t"))
    lines = [json.dumps({"step": i + 1, "lr": 10 ** (i / 2 - 4.5), "loss": loss}) for i, loss in enumerate(losses)]
    Path("runs/t/metrics.jsonl").write_text("\n".join([*lines[:2], '{"step": 2, "lr": null, "loss": "x"}', *lines[2:], ""]))
    assert cli.main(["plot", "range-test", "runs/t", "--smooth", "0"]) == 0
    assert words in capsys.readouterr().out


# --- fuzz -----------------------------------------------------------------------------------------------------------------

WORDS = [
    "", "0", "-1", "1", "2", "7", "1e3", "0.5", "-0.0", "1e400", "nan", "inf", "1e-320", "4294967296", "9" * 20, "9" * 5000,
    "abc", "ä", "\udcff", "日本", "x" * 5000, "a b", "'", "$(id)", "~", "~/x", "~nobody-here/x", ".", "/proc/x",
    "true", "None", "[]", "{}", "*", "[", "a/b/c", "--", "-", "-h", "olmo2-tiny", "olmo2-7b", "runs/a", "runs/a/config.yaml",
    "auto", "cuda", "cuda:99", "meta", "every-2", "full", "bfloat16", "1,2", "1 2", "\x1b[0m", "\n", "x" * 300,
    *CONFIG_FILES, "loop.yaml", "folder.yaml", "config.yaml",
]  # fmt: skip


def flags_of(name):
    """The flags of a command, each with the number of values that it takes."""
    from olmo_fn.average import Soup
    from olmo_fn.checkpoints import Arguments as Checkpoints
    from olmo_fn.convert.command import ToHF
    from olmo_fn.data.inspect import Inspect
    from olmo_fn.data.tokenize import Tokenize
    from olmo_fn.evaluate import Evaluate
    from olmo_fn.generate.chat_command import Chat
    from olmo_fn.generate.command import Generate
    from olmo_fn.planner.pipeline_command import Show
    from olmo_fn.planner.plan_command import Plan
    from olmo_fn.plot import PlotSchedule
    from olmo_fn.replay.command import Arguments

    classes = {
        "average": Soup,
        "checkpoint": Checkpoints,
        "tokenize": Tokenize,
        "generate": Generate,
        "chat": Chat,
        "pipeline": Show,
        "evaluate": Evaluate,
        "convert": ToHF,
        "data": Inspect,
    }
    classes |= {"evaluate": Evaluate, "plan": Plan, "plot": PlotSchedule, "replay": Arguments, "train": Config}
    options = {"default": TINY} if name == "train" else {}
    parser = tyro.extras.get_parser(classes[name], **options)
    return [flag for action in parser._actions for flag in action.option_strings if flag not in ("-h", "--help")]


def mutated(text, draw):
    """The bytes of a config with some of them changed, taken out, or doubled."""
    data = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(data)), draw.randrange(4)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at : at + draw.randint(1, 30)]
        elif kind == 2:
            data[at:at] = data[at : at + draw.randint(1, 30)]
        else:
            data[at:at] = draw.choice(
                [b": ", b"- ", b"{", b"[", b"&a ", b"*a", b"!!python/object:os.system ", b"\t", b"\x00", b"9" * 400]
            )
    return bytes(data)


def fuzz(seed, capsys):
    """What is wrong with the end of one command, drawn from ``seed``: another code than 0, 1, 2 or 130, or a traceback."""
    draw = random.Random(seed)
    name = draw.choice(list(cli.COMMANDS))
    if draw.random() < 0.3:
        text = Path("runs/b/config.yaml").read_bytes()
        Path("config.yaml").write_bytes(mutated(text, draw))
        Path("runs/a/config.yaml").write_bytes(mutated(text, draw))
    flags = draw.choices(flags_of(name), k=draw.randint(0, 4))
    words = [word for flag in flags for word in (flag, *draw.choices(WORDS, k=draw.choice([0, 1, 1, 1, 1, 2])))]
    first = draw.choice(["olmo2-tiny", "runs/a", "config.yaml", *WORDS]) if name in ("train", "plan") else draw.choice(WORDS)
    words = [*([first] if draw.random() < 0.9 else []), *(["schedule"] if name == "plot" else []), *words]
    if name == "plot":
        words = ["schedule", *(word for word in words if word != "schedule")]
    try:
        code = cli.main([name, *words])
    except Exception as error:
        return seed, name, words, repr(error)
    said = capsys.readouterr().err
    return None if code in (0, 1, 130) or (code == 2 and said.count("\n") == 1) else (seed, name, words, code, said)


def searched(cfg, *rest):
    cfg.check()
    raise ValueError("no search here")


@pytest.fixture
def no_work(folder, monkeypatch):
    """Commands that end where training, or a search, would begin, all checks behind them."""

    def checked(cfg, command):
        cfg.check()
        cfg.on(cfg.nproc or 1).check_processes(cfg.nproc or 1)
        return 0

    monkeypatch.setattr(training, "run", checked)
    monkeypatch.setattr(search, "search", searched)
    Path("config.yaml").write_bytes(Path("runs/b/config.yaml").read_bytes())


def test_sixty_random_commands_end_without_a_traceback(no_work, capsys):
    assert [wrong for seed in range(60) if (wrong := fuzz(seed, capsys))] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_random_commands_end_without_a_traceback(no_work, capsys):
    assert [wrong for seed in range(60, 2060) if (wrong := fuzz(seed, capsys))] == []
