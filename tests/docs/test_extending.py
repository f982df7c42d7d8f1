"""The parts of docs/extending.md, files outside the package, train, decode, count, plan and divide as the package's own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import plan_ranks
import pytest
import torch
import yaml
from programs import ROOT, python

from olmo_fn import tree
from olmo_fn.checkpoint import load, step_path
from olmo_fn.cli import main as cli
from olmo_fn.cli import training
from olmo_fn.data.instances import TokenData
from olmo_fn.data.tokens import open_tokens
from olmo_fn.generate.decode import empty_cache, extend
from olmo_fn.kernels.attention import attend
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Block, Model, SwiGLU, dense
from olmo_fn.models.count import flops_per_sequence, num_params
from olmo_fn.planner.estimate import profile_of
from olmo_fn.planner.memory import peak_memory
from olmo_fn.planner.plan_input import PlanInput, check
from olmo_fn.presets import CONFIGS
from olmo_fn.spec import init
from olmo_fn.testing import Layout, RankFailed, assert_equivalent
from olmo_fn.train.choices import base_of, choosable, get
from olmo_fn.train.config import CHOICES, Config, Recipe, Run
from olmo_fn.train.events import Observer, Stepped
from olmo_fn.train.loop import train
from olmo_fn.train.observers import read_metrics
from olmo_fn.train.recipe import parameters, recipe
from olmo_fn.train.schedules import Cosine
from olmo_fn.train.session import as_tree, load_parameters, open_run

PAGE = (ROOT / "docs" / "extending.md").read_text()
CODE = {code.split("\n", 1)[0].removeprefix("# "): code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S)}
COMMANDS = [shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
PARTS = ("parallel", "moving_average", "first_tokens", "enough", "adabelief", "sdpa", "distill")
DOUBLE = torch.float64
SMALL = [
    "--model.d-model",
    "16",
    "--model.n-layers",
    "2",
    "--model.hidden-size",
    "32",
    "--model.vocab-size",
    "64",
    "--data.dtype",
    "uint8",
    "--recipe.batch-size",
    "4",
    "--recipe.sequence-length",
    "16",
    "--recipe.dtype",
    "float32",
    "--recipe.no-compile",
    "--run.steps",
    "6",
    "--run.threads",
    "1",
    "--schedule.warmup",
    "2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page in a folder that Python looks into, and tokens: documents that end with a 5."""
    folder = tmp_path_factory.mktemp("parts")
    for name, code in CODE.items():
        (folder / name).write_text(code)
    often = 1 / np.arange(1, 64)  # there is something to learn: some tokens are more frequent than others
    np.random.default_rng(0).choice(64, 20_000, p=[0, *often / often.sum()]).astype(np.uint8).tofile(folder / "tokens.npy")
    before = {*sys.modules}
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in ({*sys.modules} - before) & {"wrong_average", *(Path(name).stem for name in CODE)}:
        del sys.modules[name]


@pytest.fixture
def part(folder):
    """A module of the page, as a user's own Python imports it."""
    return lambda name: import_module(name)


def words(folder, name, run, *more):
    """The command line of the page that uses the file ``name``, with sizes that take no time."""
    (command,) = (c for c in COMMANDS if name in c and "--dry-run" not in c)
    there = {name: folder / name, "runs/teacher": folder / "teacher"}
    heads = ["--model.n-heads", "2"] if "moving-average" not in command else []
    flags = ["--data.paths", folder / "tokens.npy", "--run.folder", folder / run]
    return [str(there.get(word, word)) for word in command[1:]] + [*SMALL, *heads, *map(str, flags), *map(str, more)]


def run(folder, name, *more):
    """Carry out the command of the page; the metrics of its steps, and its output."""
    where = Path(name).stem
    done = python("-m", "olmo_fn", *words(folder, name, where, *more))
    assert done.returncode == 0, done.stderr
    return read_metrics(folder / where / "metrics.jsonl"), done.stdout


def parse(*words):
    return training.parse([str(word) for word in words], CONFIGS, "train.py")


def refusal(*words):
    """The one line with which the program refuses these words."""
    done = python("-m", "olmo_fn", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def batch_of(vocab_size, rows=4, length=8):
    ids = torch.randint(vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def config_of(model, rows=4, length=8, **fields):
    settings = {"schedule": Cosine(warmup=0), "recipe": Recipe(batch_size=rows, sequence_length=length, compile=False)}
    return Config(model, **{**settings, **fields})


def equivalent(config, layouts, pool, dtype=DOUBLE, **options):
    batches = [batch_of(config.model.vocab_size)] * 2
    return assert_equivalent(partial(recipe, config, dtype), parameters(config), layouts, batches, pool=pool, **options)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_files_stand_outside_and_import_public_modules_only(folder):
    assert {f"{name}.py" for name in PARTS} < CODE.keys()
    for name in CODE:
        for module, names in re.findall(r"^\s*from (olmo_fn[\w.]*) import (.*)$", CODE[name], re.M):
            assert not any(word.startswith("_") for word in (*module.split("."), *names.split(", "))), name
    assert CODE["moving_average.py"].count("\n") <= 80
    used = {Path(word).name for command in COMMANDS for word in command if word.endswith(".py")}
    assert used == CODE.keys()


def test_the_base_classes_are_where_the_page_says():
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| `(--[\w.-]+)` \|", PAGE, re.M)
    assert len(rows) == 10
    config = CONFIGS["olmo2-tiny"]
    paths = choosable(config, CHOICES)
    for name, module, flag in rows:
        assert base_of(type(get(config, paths[flag])), CHOICES) is getattr(import_module(module), name)
    assert len(CHOICES) == len(rows)


@pytest.mark.parametrize("script", ["check_moving_average.py", "in_python.py"])
def test_the_scripts_run(folder, script):
    if script == "in_python.py":
        done = python(script, cwd=folder)
    else:  # it starts processes itself, which import it again: Python has to have started it
        command = [sys.executable, script]
        done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    if script == "in_python.py":
        assert "5 steps, loss 4." in done.stdout
        saved = yaml.safe_load((folder / "runs" / "in-python" / "config.yaml").read_text())
        assert saved["use"][0] == str(folder / "parallel.py")
        _, params, _ = load_parameters(folder / "runs" / "in-python")  # by the names in config.yaml
        assert params["blocks"]["1"].keys() == {"moving_average", "feed_forward", "norm"}


# --- a block ----------------------------------------------------------------------------------------------------------


def test_a_block_trains(folder):
    lines, _ = run(folder, "parallel.py")
    assert lines[-1]["loss"] < lines[0]["loss"]
    _, params, _ = load_parameters(folder / "parallel")
    assert params["blocks"]["0"].keys() == {"attention", "feed_forward", "norm"}


def test_a_block_divides_as_others_do(part, pool):
    block = part("parallel").Parallel(mixer=Attention(n_heads=2), feed_forward=SwiGLU(hidden_size=12))
    layouts = [Layout(Mesh(pp=2)), Layout(Mesh(dp_shard=2, tp=2)), Layout(Mesh(cp=2))]
    equivalent(config_of(Model(d_model=8, n_layers=2, vocab_size=13, block=block)), layouts, pool)


# --- a mixer ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def averaging(part):
    """A model of moving averages, and of attention in every second block."""
    mixers = (part("moving_average").MovingAverage(channels=6, penalty=0.1), Attention(n_heads=2))
    pattern = tuple(Block(mixer=mixer, feed_forward=SwiGLU(hidden_size=12)) for mixer in mixers)
    return Model(d_model=8, n_layers=3, vocab_size=13, pattern=pattern)


def test_a_mixer_trains_and_reports(folder):
    lines, _ = run(folder, "moving_average.py", "--model.channels", "24")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["average_penalty"] > 0 and line["longest_memory"] > 1 for line in lines)
    assert lines[0]["loss"] == pytest.approx(lines[0]["ce"] + lines[0]["z"] + lines[0]["average_penalty"], rel=1e-5)


def test_a_mixer_resumes_bitwise(folder, capsys):
    class Three(Observer):
        def __call__(self, event):
            return "enough" if isinstance(event, Stepped) and event.step == 3 else None

    def config(where):
        return parse(*words(folder, "moving_average.py", where, "--model.channels", "24")[1:])

    def state(where):
        session = open_run(config(where))
        like = as_tree(session.first_state())
        return tree.flatten(load(step_path(session.folder / "checkpoints", 6), like)[0])

    assert train(config("whole")).step == 6
    stopped = train(config("halves"), [Three()])
    assert 3 <= stopped.step < 6
    assert train(config("halves")).step == 6
    whole, halves = state("whole"), state("halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[path], halves[path]) for path in whole)


def test_a_mixer_is_the_recurrence_that_it_says(part):
    v = torch.randn(2, 9, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    keep, starts = torch.tensor([0.9, 0.5, 0.0], dtype=DOUBLE), (0, 4, 5)
    positions = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    h, rows = torch.zeros(2, 3, dtype=DOUBLE), []
    for t in range(9):
        h = v[:, t] + (0.0 if t in starts else keep * h)
        rows.append(h)
    found = part("moving_average").averages(v, keep, positions)
    assert torch.allclose(found, torch.stack(rows, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 1, 6)], ids=str)
def test_a_mixer_decodes_as_it_trains(averaging, chunks):
    """Rows of 12, 7, 3 and 1 tokens, padded at the left, read in chunks: as each is computed alone and at once."""
    params = init(transformer.specs(averaging), 0, DOUBLE)
    lengths = torch.tensor([12, 7, 3, 1])
    ids = torch.randint(13, (4, 12), generator=torch.Generator().manual_seed(0))
    cache = empty_cache(averaging, 4, 12, 12 - lengths, dtype=DOUBLE)
    stop = 0
    for chunk in ids.split(chunks, 1):
        found, cache = extend(averaging, params, chunk, cache)
        stop += chunk.shape[1]
        for row, length in enumerate(lengths.tolist()):
            if stop > 12 - length:
                alone = transformer.logits(averaging, params, {"input_ids": ids[row : row + 1, 12 - length : stop]})[0, -1]
                assert torch.allclose(found[row], alone, rtol=0, atol=1e-10)
    plain = empty_cache(averaging, 4, 12, dtype=DOUBLE)
    expected = transformer.logits(averaging, params, {"input_ids": ids})[:, -1]
    assert torch.allclose(extend(averaging, params, ids, plain)[0], expected, rtol=0, atol=1e-10)


def test_a_mixer_keeps_documents_apart(averaging):
    params, ids = init(transformer.specs(averaging), 0, DOUBLE), batch_of(13, 1, 12)["input_ids"]
    documents = torch.tensor([[0] * 5 + [1] * 7])
    both = transformer.logits(averaging, params, {"input_ids": ids, "documents": documents})
    for part in (slice(0, 5), slice(5, 12)):
        alone = transformer.logits(averaging, params, {"input_ids": ids[:, part]})
        assert torch.allclose(both[:, part], alone, rtol=0, atol=1e-10)


def test_a_mixer_is_counted(averaging):
    D, C, F, V, T = 8, 6, 12, 13, 20
    average, attention, feed_forward = 3 * D * C + C, 4 * D * D + 2 * D, 3 * D * F
    norms = 2 * 3 * D + D
    assert num_params(averaging) == 2 * average + attention + 3 * feed_forward + norms + 2 * V * D
    matrices = 2 * 3 * D * C + 4 * D * D + 3 * feed_forward + V * D
    assert flops_per_sequence(averaging, T) == 3 * (2 * T * matrices + 4 * D * T * (T + 1) // 2)


def test_a_mixer_is_planned(part, folder):
    """The bytes of one process at the largest moment of a step, on paper and measured."""
    mixer = part("moving_average").MovingAverage(channels=96)
    model = Model(d_model=64, n_layers=5, vocab_size=501, block=Block(mixer=mixer, feed_forward=SwiGLU(hidden_size=161)))
    shape = {"batch_size": 8, "sequence_length": 128, "compile": False, "dtype": "float32"}
    for remat in ("none", "full"):
        plan = check(PlanInput(Config(model, recipe=Recipe(**shape, remat=remat), run=Run(steps=5000)), Mesh(), "cpu"))
        measured = plan_ranks.single_peak(plan.cfg, getattr(torch, plan.dtype))
        assert peak_memory(plan, profile_of(plan)).total == pytest.approx(measured, rel=0.002, abs=100)


def test_a_mixer_is_in_the_dry_run(folder, capsys):
    (command,) = (c for c in COMMANDS if "--dry-run" in c)
    line = [str(folder / word) if word.endswith(".py") else word for word in command[1:]]
    assert cli.main([*line, *SMALL, "--gpus", "4", "--mesh.tp", "2"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"blocks\.\*\.moving_average\.w_gate  x 2 +16 x 256 +8 x 256 +dim 0 over fsdp", text)


def test_a_mixer_divides(part, pool):
    """As the page checks it: all metrics, gradients and states, and the loss's own among the metrics."""
    script = part("check_moving_average")
    assert [layout.mesh.size for layout in script.layouts] == [2, 2, 4]
    assert max(script.check(pool)) < 1e-10
    step = recipe(script.config, DOUBLE)
    _, metrics = step(step.init(init(parameters(script.config), 0, DOUBLE)), batch_of(13))
    assert {"loss", "average_penalty", "longest_memory"} < metrics.keys()


def test_the_check_finds_a_mean_where_a_sum_should_be(folder, part, pool):
    wrong = CODE["moving_average.py"].replace("h.square().mean(-1).sum()", "h.square().mean()")
    (folder / "wrong_average.py").write_text(wrong)
    mixer = part("wrong_average").MovingAverage(channels=6, penalty=1.0)
    model = Model(d_model=8, n_layers=2, vocab_size=13, block=Block(mixer=mixer, feed_forward=SwiGLU(hidden_size=12)))
    with pytest.raises(AssertionError, match=r"Mesh\(dp_shard=2\): step 0, .* differs by"):
        equivalent(config_of(model), [Layout(Mesh(dp_shard=2))], pool)


def test_context_parallelism_is_refused_by_the_mixers_name(folder, part, pool):
    script = part("check_moving_average")
    named = r"--mesh\.cp is 2, but 'moving_average' of block 0 does not say how it is divided over cp"
    with pytest.raises(RankFailed, match=named):
        equivalent(script.config, [Layout(Mesh(cp=2))], pool)
    line = words(folder, "moving_average.py", "refused-cp", "--mesh.cp", "2", "--nproc", "2")
    assert re.search(named, refusal(*line))
    assert not (folder / "refused-cp" / "config.yaml").exists()
    with pytest.raises(ValueError, match=named):
        profile_of(check(PlanInput(replace(script.config, mesh=MeshConfig(cp=2)), Mesh(cp=2))))


def test_ranks_know_the_files_that_a_command_line_uses(folder, pool):
    """A pool that is kept, and started before anybody named the file."""
    pool.run(where, ranks=2)
    line = ["--use", folder / "moving_average.py", "olmo2-tiny", "--model.mixer.name", "moving-average", *SMALL]
    config = parse(*line, "--model.channels", "6")
    assert type(config.model.block.mixer) is not import_module("moving_average").MovingAverage
    equivalent(config, [Layout(Mesh(dp_shard=2))], pool)


def where(connection):
    return connection.rank


# --- a kind of dataset ------------------------------------------------------------------------------------------------


def test_a_dataset_trains(folder):
    lines, _ = run(folder, "first_tokens.py", "--data.eos-id", "5")
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert refusal(*words(folder, "first_tokens.py", "refused")).startswith(
        "error: first-tokens needs the end-of-document token"
    )


def test_a_dataset_reads_documents(part, tmp_path):
    np.array([7, 8, 5, 5, 9, 9, 9, 9, 5, 6], dtype=np.uint8).tofile(tmp_path / "t.npy")
    tokens = TokenData((open_tokens(str(tmp_path / "t.npy"), "uint8"),), 4, 10, eos_id=5)
    made = part("first_tokens").FirstTokens(shortest=2).build(tokens)
    assert len(made) == 2
    arrays = made.read(np.array([1, 0]))
    assert arrays["input_ids"].tolist() == [[9, 9, 9, 9], [7, 8, 5, 5]]
    assert arrays["label_mask"].tolist() == [[True] * 4, [True, True, True, False]]
    assert [made.origin(i).offset for i in range(2)] == [0, 4]


# --- an observer ------------------------------------------------------------------------------------------------------


def test_an_observer_stops_a_run(folder, part):
    lines, text = run(folder, "enough.py", "--observe.own.loss", "100")
    assert "a loss of" in text
    assert (folder / "enough" / "enough.txt").read_text() == f"step {lines[-1]['step']}\n"  # the last that it saw
    assert lines[-1]["step"] < 6


# --- an optimizer -----------------------------------------------------------------------------------------------------


def test_an_optimizer_trains_and_its_settings_are_in_the_help(folder, capsys):
    lines, _ = run(folder, "adabelief.py")
    assert lines[-1]["loss"] < lines[0]["loss"]
    with pytest.raises(SystemExit):
        parse("--use", folder / "adabelief.py", "olmo2-tiny", "--optim.name", "adabelief", "--help")
    text = capsys.readouterr().out
    for shown in ("--optim.belief", "--optim.weight-decay", "Decay of the square of the distance to it."):
        assert shown in text
    with pytest.raises(ValueError, match=r"--optim\.belief is 1\.0; it must be at least 0 and below 1"):
        parse("--use", folder / "adabelief.py", "olmo2-tiny", "--optim.name", "adabelief", "--optim.belief", "1").check()


def test_an_optimizer_is_the_paper_s_and_divides(part, pool):
    optim = part("adabelief").AdaBelief(lr=0.1, weight_decay=0.0, momentum=0.8, belief=0.9, eps=1e-6)
    config = config_of(dense(8, 2, 2, 12, vocab_size=13), optim=optim)
    equivalent(config, [Layout(Mesh(dp_shard=2), Rules(keep_gathered=True))], pool, tolerance=1e-8)
    step, p, m, s = recipe(config, DOUBLE), init(parameters(config), 0, DOUBLE), 0.0, 0.0
    state, batch = step.init(p), batch_of(13)
    for t in (1, 2, 3):
        g = step.grads(state.params, batch)[0]["embed"]
        before = state.params["embed"]
        state, metrics = step(state._replace(params=tree.map(torch.clone, state.params)), batch)
        m = 0.8 * m + 0.2 * g
        s = 0.9 * s + 0.1 * (g - m) ** 2
        expected = before - metrics["lr"] * (m / (1 - 0.8**t)) / ((s / (1 - 0.9**t)).sqrt() + 1e-6)
        assert torch.allclose(state.params["embed"], expected, rtol=0, atol=1e-10)


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_trains_and_refuses_what_it_cannot(folder):
    lines, _ = run(folder, "sdpa.py")
    assert lines[-1]["loss"] < lines[0]["loss"]
    documents = words(folder, "sdpa.py", "refused", "--data.mask-documents", "--data.eos-id", "5")
    assert refusal(*documents) == "error: sdpa has no windows and no documents; choose --model.mixer.name attention for them"
    windows = words(folder, "sdpa.py", "refused", "--model.window-pattern", "4", "-1")
    assert refusal(*windows).startswith("error: sdpa has no windows; leave out --model.window-pattern")
    assert not (folder / "refused" / "checkpoints").exists()


@pytest.mark.parametrize("offset", [0, 3])
def test_attention_is_the_definition(part, offset):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 6, 4), (2, 2, 6 + offset, 4), (2, 2, 6 + offset, 4))
    q, k, v = (torch.randn(shape, dtype=DOUBLE, generator=generator, requires_grad=True) for shape in shapes)
    expected = attend(q, k, v, offset=offset)
    found, pullback = part("sdpa").attend_sdpa(q.detach(), k.detach(), v.detach(), offset=offset)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn(expected.shape, dtype=DOUBLE, generator=generator)
    for a, b in zip(pullback(found, cotangent), torch.autograd.grad(expected, (q, k, v), cotangent), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_gradients_of_attention_agree_with_the_plain_form(part, pool):
    """Law 9, and law 2 with context parallelism, whose ranks attend from an offset on."""
    mixer = part("sdpa").SDPA(n_heads=4, n_kv_heads=2)
    config = config_of(
        Model(d_model=16, n_layers=2, vocab_size=13, block=Block(mixer=mixer, feed_forward=SwiGLU(hidden_size=12)))
    )
    plain = replace(config, recipe=replace(config.recipe, engine="func"))
    equivalent(config, [Layout(Mesh()), Layout(Mesh(cp=2)), Layout(Mesh(tp=2))], pool, reference=partial(recipe, plain, DOUBLE))
    with pytest.raises(RankFailed, match="ring merges parts of its own; with another attention use gather or ulysses"):
        equivalent(config, [Layout(Mesh(cp=2), Rules(cp_method="ring"))], pool)


# --- a loss -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(folder):
    cfg = parse(
        "olmo2-tiny", *SMALL, "--model.n-heads", "4", "--data.paths", folder / "tokens.npy", "--run.folder", folder / "teacher"
    )
    train(cfg)
    return folder / "teacher"


def test_a_loss_trains(folder, teacher):
    lines, _ = run(folder, "distill.py")
    assert 0 < lines[-1]["kl"] < lines[0]["kl"]
    assert all(line["loss"] == line["kl"] for line in lines)
    empty = [*words(folder, "distill.py", "refused"), "--loss.teacher", folder / "nothing"]
    assert "nothing is not there; give the folder of a run" in refusal(*empty)


def test_a_loss_is_what_it_says_and_divides(part, teacher, pool):
    session, weights, _ = load_parameters(teacher)
    config = config_of(dense(8, 2, 2, 12, vocab_size=64), loss=part("distill").Distill(teacher=str(teacher)))
    params, batch = init(parameters(config), 0, DOUBLE), batch_of(64)
    batch["labels"][0, :3] = -100
    target = transformer.logits(session.cfg.model, tree.map(lambda x: x.to(DOUBLE), weights), batch).log_softmax(-1)
    student = transformer.logits(config.model, params, batch).log_softmax(-1)
    apart = torch.nn.functional.kl_div(student, target, log_target=True, reduction="none").sum(-1)
    expected = apart[batch["labels"] != -100].mean()
    _, metrics = recipe(config, DOUBLE).grads(params, batch)
    assert metrics["loss"].item() == pytest.approx(expected.item(), abs=1e-12)
    equivalent(config, [Layout(Mesh(dp_shard=2)), Layout(Mesh(pp=2))], pool)
    with pytest.raises(RankFailed, match=r"--mesh\.tp is 2, but the loss is not written for it"):
        equivalent(config, [Layout(Mesh(tp=2))], pool)


# --- what is wrong with a part is said in one line --------------------------------------------------------------------

MISTAKES = {
    "a name that is taken": (
        '"moving-average"',
        '"attention"',
        "MovingAverage has the name 'attention', which is taken; choose",
    ),
    "no default": ("channels: Annotated[int, AT_LEAST_ONE] = 256", "channels: int", "channels of MovingAverage has no default"),
    "a metric that is not declared": (
        '"average_penalty": Metric(), ',
        "",
        "stage 'moving_average' reports the metric 'average_penalty' and declares longest_memory; declare it",
    ),
    "a field of another part": (
        "channels",
        "hidden_size",
        "--model.hidden-size is a field of MovingAverage and of SwiGLU; give",
    ),
    "a sublayer's name that is taken": (
        '"moving_average",',
        '"feed_forward",',
        "block 0 has two sublayers of the name 'feed_forward'",
    ),
}


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_told(tmp_path, folder, capsys, old, new, message):
    code = CODE["moving_average.py"]
    assert old in code
    (tmp_path / "mine.py").write_text(code.replace(old, new))
    line = words(folder, "moving_average.py", tmp_path / "run")
    line[line.index("--use") + 1] = str(tmp_path / "mine.py")
    at = line.index("--model.channels")
    assert cli.main(line[:at] + line[at + 2 :]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_a_part_without_its_build_is_named(part):
    """A mistake of whoever writes the file: a traceback that ends with the class."""

    class Nothing(part("moving_average").MixerSettings):
        name = "nothing"

    with pytest.raises(NotImplementedError, match="Nothing has no build"):
        transformer.specs(Model(8, 1, 13, block=Block(mixer=Nothing())))
