"""Tokenizing that is killed goes on, and ends with the bytes of a run that nobody killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmo_fn.cli import main as cli
from olmo_fn.data import journal
from olmo_fn.data import tokenize as tokenizing
from olmo_fn.data.tokenize import Tokenize, tokenize

WORDS = ["alpha", "beta", "gamma", "Straße", "日本", "x = 1\n", "<|endoftext|>", "12345"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two files of lines, some of them copies, and a conversation file; a chunk is of 4 kB in these tests."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("resume")
    for name in ("a", "b"):
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(5, 60))) for _ in range(800)]
        lines = [json.dumps({"text": rng.choice(texts[:50]) if rng.random() < 0.2 else text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    talks = [[{"role": r, "content": " ".join(rng.choices(WORDS, k=9))} for r in ("user", "assistant")] for _ in range(400)]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    (folder / "chat.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
    return folder


def small(monkeypatch, seconds=0.0):
    """Chunks of 4 kB, and a record after every one."""
    monkeypatch.setattr(tokenizing, "RECORD_SECONDS", seconds)
    monkeypatch.setattr(tokenizing, "chunks", lambda files: chunks(files, 4096))


chunks = tokenizing.chunks


def made(folder):
    """The files but meta.json; a process that is killed behind the last of them may leave its empty work folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json" and path.is_file()}


def meta_of(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return {key: value for key, value in meta.items() if key != "command"}


def killed(config, after):
    """Whether SIGKILL came before the end, ``after`` so many seconds, in a fork that has imported all."""
    child = os.fork()
    if not child:
        try:
            tokenize(config, show=False)
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def config_of(text, kind, output):
    if kind == "chat":
        template = str(text / "chat.jinja")
        return Tokenize((str(text / "talks.jsonl"),), str(output), "byte", chat_template=template, workers=1, part_tokens=5000)
    inputs = tuple(str(text / f"{name}.jsonl") for name in "ab")
    more = {"dedup": "exact", "filter": ("min-words=10",), "decontaminate": (f"talks={text / 'talks.jsonl'}",), "ngram": 6}
    return Tokenize(inputs, str(output), "byte", workers=1, heldout=0.1, part_tokens=30_000, **more)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_killed_at_random_times(text, tmp_path, monkeypatch, kind):
    """With a tokenizer of bytes, so that no threads are in the forks."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    small(monkeypatch)
    begin = time.monotonic()
    tokenize(config_of(text, kind, tmp_path / "whole"), show=False)
    seconds = time.monotonic() - begin
    rng = random.Random(kind)
    for i in range(4):
        out = tmp_path / f"out{i}"
        config = config_of(text, kind, out)
        for _ in range(3):
            if (out / "meta.json").exists():
                break
            killed(config, rng.uniform(0, 0.7 * seconds))
        if not (out / "meta.json").exists():  # which comes last: with it all is there
            tokenize(config, show=False)
        assert made(out) == made(tmp_path / "whole")
        assert meta_of(out) == meta_of(tmp_path / "whole")


def stopped(monkeypatch, config, when):
    """The command stops in the middle, as a full disk would have it: before the ``when``-th record."""
    count, record = 0, journal.Draft.record

    def fail(self, state):
        nonlocal count
        count += 1
        if count == when:
            raise KeyboardInterrupt
        record(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Draft, "record", fail)
        with pytest.raises(KeyboardInterrupt):
            tokenize(config, show=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_it_goes_on_from_every_record_with_any_number_of_workers(text, tmp_path, monkeypatch, workers):
    small(monkeypatch)
    config = config_of(text, "text", tmp_path / "whole")
    tokenize(config, show=False)
    for when in (2, 9, 40) if workers == 1 else (20,):
        out = tmp_path / f"{workers}-{when}"
        config = config_of(text, "text", out)
        stopped(monkeypatch, config, when)
        assert [path.name for path in out.iterdir()] == [".unfinished"]
        with open(out / ".unfinished" / "journal.jsonl", "a") as file:
            file.write('{"sizes": {"part')  # as a power cut leaves it
        said = []
        tokenize(tokenizing.replace(config, workers=workers), show=False, say=said.append)
        assert said[-1].startswith("going on behind ")
        assert made(out) == made(tmp_path / "whole")
        assert meta_of(out) == meta_of(tmp_path / "whole")


@pytest.mark.parametrize("at", range(4))
def test_a_kill_while_the_files_are_moved(text, tmp_path, monkeypatch, at):
    """Also over the files of another run, which are gone at the end."""
    small(monkeypatch)
    out, whole = tmp_path / "out", tmp_path / "whole"
    tokenize(config_of(text, "chat", whole), show=False)
    tokenize(tokenizing.replace(config_of(text, "text", out), part_tokens=1), show=False)
    config = tokenizing.replace(config_of(text, "chat", out), overwrite=True)
    moves, replace = 0, os.replace

    def fail(source, target):
        nonlocal moves
        moves += os.path.dirname(target) == str(out)
        if moves == (1, 2, 4, 10**9)[at] and os.path.dirname(target) == str(out):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "replace", fail)
        if at == 3:  # all is moved, and the draft still there
            patch.setattr(journal.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tokenize(config, show=False)
    tokenize(config, show=False)
    assert made(out) == made(whole)
    assert meta_of(out) == meta_of(whole)


def test_what_has_changed_is_named(text, tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    for name in "ab":
        shutil.copy(text / f"{name}.jsonl", tmp_path)
    (tmp_path / "mine.py").write_text("def keep(text):\n    return True\n")
    out = tmp_path / "out"
    common = [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
        "--output",
        str(out),
        "--tokenizer",
        "byte",
        "--workers",
        "1",
    ]
    common += ["--filter", f"{tmp_path / 'mine.py'}:keep"]
    inputs = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    stopped(monkeypatch, Tokenize(inputs, str(out), "byte", workers=1, filter=(common[-1],)), 5)

    def error(*flags):
        code = cli.main(["tokenize", *common, *flags])
        assert code == 2
        return capsys.readouterr().err

    assert "out' is unfinished, and --heldout was 0.01 and is 0.2; run the command" in error("--heldout", "0.2")
    assert "is unfinished, and --special-tokens was False and is True" in error("--special-tokens")
    assert "a.jsonl is new" in error("--heldout-inputs", str(text / "a.jsonl"))
    (tmp_path / "mine.py").write_text("def keep(text):\n    return None\n")
    assert "mine.py has " in error()
    assert "a.jsonl' line 1; it must be True for what is kept" in error("--overwrite")
    (tmp_path / "mine.py").write_text("def keep(text):\n    return True\n")
    stopped(monkeypatch, Tokenize(inputs, str(out), "byte", workers=1, filter=(common[-1],)), 5)
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert "b.jsonl has " in (refused := error())
    assert refused.count("\n") == 1
    assert "or --overwrite to begin anew" in refused
    assert cli.main(["tokenize", *common, "--overwrite"]) == 0
    capsys.readouterr()
    assert "is not empty; give another folder, or --overwrite" in error()


def test_one_process_at_a_time(text, tmp_path):
    config = config_of(text, "text", tmp_path / "out")
    with journal.draft(tmp_path / "out", {}, lambda old, new: "", False), pytest.raises(ValueError, match="another process is"):
        tokenize(config, show=False)


def test_workers_do_not_outlive_a_killed_command(text, tmp_path):
    """They end by themselves when the process that they work for is gone."""
    (tmp_path / "a.jsonl").write_bytes((text / "a.jsonl").read_bytes() * 60)
    command = [sys.executable, "-m", "olmo_fn", "tokenize", str(tmp_path / "a.jsonl"), "--tokenizer", "byte", "--workers", "2"]
    process = subprocess.Popen([*command, "--output", str(tmp_path / "out")], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    children: set[str] = set()
    while len(children) < 3 and time.monotonic() < deadline:  # two, and multiprocessing's own
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = {child for task in tasks for child in task.read_text().split()}
    process.kill()
    process.wait()
    assert len(children) == 3
    while (alive := [c for c in children if os.path.exists(f"/proc/{c}")]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive
