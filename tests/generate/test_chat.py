"""A conversation: in Python, over a pipe, in a terminal, and what is refused."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from select import select

import pytest
import torch
from generating import random_params
from programs import ROOT

from olmo_fn.checkpoint import save
from olmo_fn.cli import main as cli
from olmo_fn.data.template import ChatTemplate, Message, encode_chat
from olmo_fn.data.tokenizer import byte_level
from olmo_fn.generate.chat import Conversation
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.load import load_model
from olmo_fn.generate.memory import Memory
from olmo_fn.generate.sample import sample
from olmo_fn.generate.text import LanguageModel, decoded
from olmo_fn.models.config import dense
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.serialize import to_yaml

CFG = dense(16, 2, 2, 32, vocab_size=257, window_pattern=(48, -1), init_method="fan_in")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model answers in bytes, with a chat template."""
    return made(tmp_path_factory.mktemp("runs") / "tiny", -1.0)


def made(folder: Path, end: float) -> Path:
    """Such a run; ``end`` are the weights of what ends an answer: with 0 there is always another byte that is likelier."""
    folder.mkdir()
    cfg = Config(CFG, recipe=Recipe(sequence_length=200), run=Run(folder=str(folder)))
    (folder / "config.yaml").write_text(to_yaml(cfg))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    byte_level().save(folder / "tokenizer.json")
    params = random_params(CFG, dtype=torch.float32)
    params["head"]["w_out"][byte_level().eos_id] = end
    params["head"]["w_out"][0x80:0x100] = 0.0  # answers are ASCII
    save({"step": torch.tensor(3), "params": params, "slots": {}}, folder / "checkpoints", step=3)
    return folder


def template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE, {"eos_token": "<|endoftext|>"})


def answer_of(model: LanguageModel, messages: list[Message], how: Sampling = GREEDY) -> str:
    """What the model says to the messages, read from the beginning."""
    ids = encode_chat(model.tokenizer, template(), messages)
    eos = model.tokenizer.eos_id
    tokens = [step[0] for step in sample(model.cfg, model.params, [ids], how, stop_ids=(eos,))]
    return "".join(decoded(model.tokenizer, (i for i in tokens if i not in (None, eos))))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_every_answer_is_that_to_the_whole_conversation(run: Path) -> None:
    model, _ = load_model(run)
    talk = Conversation(model, template(), GREEDY, system="Be brief.")
    history = [said("system", "Be brief.")]
    for text in ("hi", "who are you? é", "bye <|endoftext|>"):
        history.append(said("user", text))
        found = "".join(talk.ask(text).pieces)
        assert found == answer_of(model, history)
        history.append(said("assistant", found))
    assert talk.messages == history[1:]


def test_history_is_not_read_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(run)
    talk = Conversation(model, template(), GREEDY)
    "".join(talk.ask("a long first message, in so many words").pieces)
    before = len(talk.memory.ids)
    taken: list[int] = []
    take = Memory.take

    def watched(memory, cfg, params, prompt, capacity):
        cache = take(memory, cfg, params, prompt, capacity)
        taken.append(cache.length)
        return cache

    monkeypatch.setattr(Memory, "take", watched)
    "".join(talk.ask("and then?").pieces)
    assert taken == [before]


def test_an_answer_that_is_not_read_to_its_end_stays_as_far_as_it_was(run: Path) -> None:
    model, _ = load_model(run)
    talk = Conversation(model, template(), GREEDY)
    pieces = talk.ask("hi").pieces
    start = next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages == [said("user", "hi"), said("assistant", start)]
    assert "".join(talk.ask("go on").pieces) == answer_of(model, [*talk.messages[:2], said("user", "go on")])

    def interrupt(token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("never", interrupt).pieces)
    assert talk.messages[-1]["role"] == "assistant"  # nothing was said, so nothing was asked


def test_a_conversation_that_is_too_long_is_refused_or_loses_its_oldest_messages(run: Path) -> None:
    model = load_model(run)[0]._replace(context=80)
    talk = Conversation(model, template(), GREEDY)
    "".join(talk.ask("x" * 40).pieces)
    held = list(talk.messages)
    with pytest.raises(ValueError, match=r"the conversation is \d+ tokens, and the model's context 80; begin anew \(/reset\)"):
        talk.ask("y" * 40)
    assert talk.messages == held
    talk.forget = True
    pieces, left_out, most = talk.ask("y" * 40)
    assert (left_out, most) == (2, 12)
    assert "".join(pieces) == answer_of(model, [said("user", "y" * 40)])
    with pytest.raises(ValueError, match="context 80; make it shorter"):
        talk.ask("z" * 100)
    with pytest.raises(ValueError, match="not valid UTF-8"):
        talk.ask("a\udc80")


# --- the command ------------------------------------------------------------------------------------------------------

FLAGS = ["--max-tokens", "12", "--temperature", "0"]


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *words: object) -> int:
    """``olmo-fn chat`` with ``lines`` in its stdin."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return cli.main(["chat", *map(str, words)])


def test_a_line_of_a_pipe_is_a_message(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_model(run)
    before = signal.getsignal(signal.SIGINT)
    lines = "hi\n\nwhat?\n/nonsense\n/reset\nhi\n/quit\nnever\n"
    assert chat(monkeypatch, lines, run, *FLAGS, "--system", "Be brief.") == 0
    assert signal.getsignal(signal.SIGINT) is before
    system = said("system", "Be brief.")
    first = answer_of(model, [system, said("user", "hi")])
    second = answer_of(model, [system, said("user", "hi"), said("assistant", first), said("user", "what?")])
    out, err = capsys.readouterr()
    assert out == f"{first}\n{second}\n{first}\n"
    assert "/nonsense is no command: /reset forgets what was said, /quit or Ctrl-D ends" in err
    assert "the answer was cut after 12 tokens" in err


def test_a_template_of_ones_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[-1].content }}")
    assert chat(monkeypatch, "abc", run, *FLAGS, "--chat-template", tmp_path / "own.jinja") == 0
    own = capsys.readouterr().out
    assert chat(monkeypatch, "abc", run, *FLAGS) == 0
    assert own != capsys.readouterr().out


def test_messages_that_do_not_fit(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = f"{'x' * 150}\n{'y' * 150}\nhi\n"
    assert chat(monkeypatch, lines, run, *FLAGS) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2  # to the first and the last
    assert "error: the conversation is " in err
    assert chat(monkeypatch, lines, run, *FLAGS, "--truncate-prompt", "left") == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    assert "the oldest 2 messages were left out (--truncate-prompt left)" in err


def test_a_model_without_a_template_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    bare = tmp_path / "bare"
    subprocess.run(["cp", "-r", str(run), str(bare)], check=True)
    (bare / "chat_template.jinja").unlink()
    for words, message in [
        (
            [bare],
            f"has no chat template, as a model that was not trained to chat; it goes on from a text: olmo-fn generate {bare}",
        ),
        ([bare, "--chat-template", tmp_path / "none.jinja"], "none.jinja"),
        ([tmp_path / "nowhere"], "is not there; give the folder of a run"),
        ([run, "--temperature", "-1"], "--temperature is -1.0"),
    ]:
        assert chat(monkeypatch, "hi", *words) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("error: ")
        assert message in err


def test_a_terminal_has_a_prompt_and_ctrl_c_ends_the_answer_and_not_the_program(tmp_path: Path) -> None:
    run = made(tmp_path / "endless", 0.0)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "olmo_fn", "chat", str(run), "--temperature", "0", "--max-tokens", "190"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""

    def read_until(done: Callable[[], bool]) -> None:
        nonlocal text
        while not done():
            assert select([ours], [], [], 100)[0], text
            text += os.read(ours, 1000)

    def prompts() -> int:
        return text.count(b"> ")

    read_until(lambda: prompts() == 1)
    assert b"/reset forgets what was said" in text
    text = b""
    os.write(ours, b"hi\n")
    read_until(lambda: len(text) > len(b"hi\r\n") + 3)
    process.send_signal(signal.SIGINT)
    read_until(lambda: prompts() == 1)
    assert b"was cut" not in text
    for _ in range(50):  # while nothing is written; what comes just before it reads, Python sees with the next one only
        process.send_signal(signal.SIGINT)
        if select([ours], [], [], 2)[0]:
            break
    read_until(lambda: prompts() == 2)
    assert b"/reset forgets what was said" in text
    os.write(ours, b"hello\n")
    read_until(lambda: prompts() == 3)
    assert text.endswith(b"\r\n> ")  # behind an answer
    assert b"was cut after" in text
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    assert b"Traceback" not in text
    os.close(ours)
