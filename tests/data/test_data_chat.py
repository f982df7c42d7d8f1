"""Conversations to tokens and label masks, and training on what assistants say, packed."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.cli import main as cli
from olmo_fn.data.conversations import pieces
from olmo_fn.data.instances.packed import Packed
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import constant_sizes
from olmo_fn.data.source import open_data
from olmo_fn.data.template import ChatTemplate, encode_chat
from olmo_fn.data.tokenize import Tokenize, tokenize
from olmo_fn.data.tokenizer import byte_level, load
from olmo_fn.train.observers import read_metrics

PLAIN = """{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% if m.role == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
MARKED = """{% for m in messages %}<{{ m.role }}>{% if m.role == "assistant" %}{% generation %}{{ m.content }}{{ eos_token }}{%
endgeneration %}{% else %}{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi<|endoftext|>"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long", "tool_calls": None},
]
OTHER = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture
def talks(tmp_path):
    lines = [{"messages": TALK}, {"messages": OTHER}, {"messages": OTHER[:1]}]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "plain.jinja").write_text(PLAIN)
    (tmp_path / "marked.jinja").write_text(MARKED)
    return tmp_path


def made(folder, template, **flags):
    files = (str(folder / "talks.jsonl"),)
    flags = {"workers": 1, "heldout": 0.0, "chat_template": str(folder / template), **flags}
    meta = tokenize(Tokenize(files, str(folder / "out"), "byte", **flags))
    ids = np.fromfile(folder / "out" / "part-00000.npy", meta["dtype"])
    mask = np.fromfile(folder / "out" / "mask-00000.npy", np.bool_)
    assert len(ids) == len(mask)
    return ids, mask, meta


def learned(ids, mask):
    """What is in the loss, an end of a document as a dot."""
    return bytes(np.where(ids == 256, ord("."), ids)[mask].astype(np.uint8)).decode()


@pytest.mark.parametrize(
    ("template", "loss_on", "expected"),
    [
        ("marked.jinja", "assistant", "hello.so long.4."),
        ("plain.jinja", "assistant", "hello\n.so long\n.4\n."),
        ("marked.jinja", "last", "so long.4."),
        ("plain.jinja", "last", "so long\n.4\n."),
    ],
)
def test_what_assistants_say_is_in_the_loss(talks, template, loss_on, expected):
    ids, mask, meta = made(talks, template, loss_on=loss_on)
    assert learned(ids, mask) == expected
    assert meta["dropped"] == {"without an answer": 1}
    assert (ids == 256).sum() == 3  # the one that a user wrote is text
    assert (talks / "out" / "chat_template.jinja").read_text() == (talks / template).read_text()


def test_everything_may_be_in_the_loss(talks):
    _, mask, meta = made(talks, "plain.jinja", loss_on="all")
    assert mask.all()
    assert meta["train"]["documents"] == 3


def test_a_prompt_has_the_ids_that_it_has_when_a_model_is_to_answer(talks):
    ids, mask, _ = made(talks, "plain.jinja")
    template = ChatTemplate(PLAIN, {"eos_token": "<|endoftext|>"})
    prompt = encode_chat(byte_level(), template, TALK[:-1])
    assert ids[: len(prompt)].tolist() == prompt
    assert mask[len(prompt)]
    assert not mask[len(prompt) - 1]


contents = st.text(st.sampled_from("ab <|>\n\ufdd0\ufdd1{}"), max_size=9)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), contents), min_size=1, max_size=6))
def test_law_pieces_are_the_conversation(turns):
    messages = [{"role": role, "content": content.replace("\ufdd1", "")} for role, content in turns]
    for source in (PLAIN, MARKED):
        template = ChatTemplate(source, {"eos_token": "<|endoftext|>"})
        found = pieces(template, messages, "assistant", "here")
        assert "".join(piece for piece, _ in found) == template.render(messages, add_generation_prompt=False)
        said = [content.replace("\ufdd1", "") for role, content in turns if role == "assistant"]
        assert "".join(piece for piece, loss in found if loss).replace("<|endoftext|>", "").replace("\n", "") == "".join(
            said
        ).replace("<|endoftext|>", "").replace("\n", "")


def test_wrong_conversations(talks, capsys):
    changes = "{% for m in messages %}{% if loop.last %}<think>{% endif %}{{ m.content }}{% endfor %}"
    for content, template, message in (
        ({"text": "x"}, PLAIN, "line 1 has no messages in 'messages', a list of objects with a role; there is: text"),
        ({"messages": TALK}, changes, "line 1: the chat template writes message 3 otherwise than it asks for it"),
        ({"messages": TALK}, "{{ raise_exception('no system') }}", "line 1: the chat template does not take this"),
        ({"messages": TALK}, "{% for %}", "the chat template is wrong in line 1"),
    ):
        (talks / "talks.jsonl").write_text(json.dumps(content) + "\n")
        (talks / "t.jinja").write_text(template)
        words = [talks / "talks.jsonl", "--output", talks / "o", "--tokenizer", "byte", "--chat-template", talks / "t.jinja"]
        assert cli.main(["tokenize", *map(str, words), "--workers", "1"]) == 2
        error = capsys.readouterr().err
        assert (message in error, error.count("\n")) == (True, 1), error
    words = [str(talks / "talks.jsonl"), "--output", str(talks / "o"), "--chat-template", "gone.jinja"]
    assert cli.main(["tokenize", *words, "--tokenizer", "byte"]) == 2
    assert "--chat-template 'gone.jinja' is not there" in capsys.readouterr().err
    assert cli.main(["tokenize", *words]) == 2
    assert "--chat-template needs the tokenizer of the model" in capsys.readouterr().err


def test_packed_whole_conversations_with_their_masks(talks):
    """Ends of turns do not cut a conversation: where they end is written beside the file."""
    made(talks, "plain.jinja")
    out = talks / "out"
    data = Data(
        (str(out / "part-*.npy"),),
        label_mask_paths=(str(out / "mask-*.npy"),),
        tokenizer=str(out / "tokenizer.json"),
        boundaries="metadata",
        heldout_fraction=0.0,
        instances=Packed(),
    )
    batch = open_data(data, 257, constant_sizes(1, 128)).train(0)
    row, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
    inside = labels >= 0
    assert learned(labels, inside).replace("\n", "") in ("4.hello.so long.", "hello.so long.4.")
    assert len(row) == 128


def test_the_command_that_it_prints_trains(talks, capsys, monkeypatch):
    """From conversations to three steps on what assistants say."""
    monkeypatch.chdir(talks)
    lines = [{"messages": [{**OTHER[0], "content": f"{i}+{i}?"}, {**OTHER[1], "content": f"{2 * i}"}]} for i in range(60)]
    (talks / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = "tokenize talks.jsonl --output sft --tokenizer byte --chat-template marked.jinja --heldout 0.1 --workers 1"
    assert cli.main(words.split()) == 0
    command = capsys.readouterr().out.splitlines()[-1].replace("'", "").split()
    assert command[:3] == ["python", "train.py", "olmo2-tiny"]
    assert "--data.instances.name" in command
    small = """--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.hidden-size 32 --recipe.no-compile
        --recipe.sequence-length 64 --recipe.batch-size 2 --recipe.dtype float32 --run.threads 1 --run.steps 3
        --schedule.warmup 0 --run.sample= --data.mask-documents"""
    assert cli.main(["train", *command[2:], *small.split()]) == 0, capsys.readouterr().err
    metrics = read_metrics(talks / "runs" / "sft" / "metrics.jsonl")
    assert [line["loss"] > 0 for line in metrics][:3] == [True] * 3
    assert load(talks / "sft" / "tokenizer.json").eos_id == 256
