"""GGUF files: what is written is read again to the bit, and transformers reads the same model and tokenizer from it."""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf_peers import (
    CASES,
    LLAMA3,
    NO_TOKENIZER,
    ids_for,
    logits,
    model_for,
    parameters,
    random,
    read_by_transformers,
    split,
    trained,
    written,
)
from helpers import same_bits
from hf_peers import TEMPLATE, directory, with_tokenizer
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from olmo_fn.cli import main as cli
from olmo_fn.formats import gguf_file
from olmo_fn.formats.config_json import json_of
from olmo_fn.formats.gguf_file import Place, open_gguf
from olmo_fn.formats.gguf_tokenizer import CL100K, JSON, KEY, QWEN2, describe, rebuilt
from olmo_fn.train.session import load_parameters


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_again(case, tmp_path):
    """The model, the bits of every parameter, and the bits of a file of what was read."""
    model = model_for(case)
    params = random(model)
    first = written(tmp_path / "first" / "x.gguf", model, params)
    found = open_gguf(first)
    again = parameters(found)
    assert json_of(found.model) == json_of(model)
    assert again.keys() == params.keys()
    assert [path for path, p in params.items() if not same_bits(again[path], p)] == []
    assert written(tmp_path / "second" / "x.gguf", found.model, again).read_bytes() == first.read_bytes()


def test_gains_around_0_lose_their_last_bits_once(tmp_path):
    """llama.cpp keeps 1 + g of Gemma's gains, in fp32."""
    model = model_for("gemma3")
    params = random(model)
    params = {path: p * 1.000001 if p.ndim == 1 else p for path, p in params.items()}
    once = parameters(open_gguf(written(tmp_path / "a.gguf", model, params)))
    twice = parameters(open_gguf(written(tmp_path / "b.gguf", model, once)))
    assert same_bits(once, twice)
    for path, p in params.items():
        assert (once[path] - p).abs().max() <= 2.0**-23, path


@pytest.mark.parametrize("case", ["llama", "olmo2-tied", "gemma3"])
def test_smaller_dtypes_differ_by_their_rounding(case, tmp_path):
    model = model_for(case)
    params = random(model)
    half = parameters(open_gguf(written(tmp_path / "half.gguf", model, params, "f16")))
    file = open_gguf(written(tmp_path / "eight.gguf", model, params, "q8_0"))
    eight = parameters(file)
    assert set(file.types) == {"Q8_0", "F32"}
    for path, p in params.items():
        if p.ndim == 1:
            assert same_bits(half[path], p)
            assert same_bits(eight[path], p)
            continue
        assert same_bits(half[path], p.half().float())
        rows = p.T if path.startswith("blocks") else p  # (out, in): a scale for 32 of a row
        most = rows.reshape(-1, 32).abs().amax(-1, keepdim=True)
        error = ((eight[path].T if path.startswith("blocks") else eight[path]) - rows).reshape(-1, 32).abs()
        step = most / 127  # half a step, and the scale in fp16
        assert bool((error <= step / 2 + most * 2.0**-11 + 1e-7).all()), path
        assert float(error.max()) > 0


def test_rows_that_q8_0_cannot_cut_are_f16(tmp_path):
    model = model_for("llama", intermediate_size=80)
    file = open_gguf(written(tmp_path / "x.gguf", model, random(model), "q8_0"))
    assert file.tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert file.tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


@pytest.mark.parametrize("kind", ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_other_quantisations_are_read(kind, tmp_path, monkeypatch):
    """Files of others: the matrices quantised by the package, and what it makes of them again."""
    model = model_for("llama")
    params = random(model)
    number = gguf.GGMLQuantizationType[kind]
    monkeypatch.setattr(gguf_file, "kind_of", lambda shape, dtype: "F32" if len(shape) == 1 else kind)
    file = open_gguf(written(tmp_path / "x.gguf", model, params, "q8_0"))
    assert file.types == [kind, "F32"]
    w = params["blocks.1.feed_forward.w_down"].T.contiguous().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(w, number), number)
    assert same_bits(file.parameter("blocks.1.feed_forward.w_down"), torch.from_numpy(expected.copy()).T)


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
@pytest.mark.parametrize("case", ["llama", "llama-tied", "qwen3", "gemma3"])
def test_transformers_reads_the_same_model(case, dtype, tmp_path):
    """By its own reader of GGUF files, for the architectures that this has."""
    model = model_for(case)
    file = open_gguf(written(tmp_path / "x.gguf", model, random(model), dtype))
    expected, found = theirs(tmp_path, model), logits(model, parameters(file))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def theirs(folder, model):
    """Logits of the file in ``folder`` by transformers, in fp32."""
    peer = read_by_transformers(folder / "x.gguf")
    with torch.no_grad():
        return peer(input_ids=ids_for(model)).logits


def test_the_comparison_notices_rows_in_the_wrong_order(tmp_path, monkeypatch):
    """A mutant: queries and keys as transformers has them. Our own round trip does not notice it; transformers does."""
    model = model_for("llama")
    params = random(model)
    monkeypatch.setattr(Place, "order", lambda place: torch.arange(place.stored.shape[0]))
    file = open_gguf(written(tmp_path / "x.gguf", model, params))
    assert same_bits(parameters(file), params)
    expected = theirs(tmp_path, model)
    assert (logits(model, parameters(file)) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("case", ["olmo2", "olmo3", "olmo3-long", "llama-biased"])
def test_tensors_have_llama_cpps_names_and_transformers_values(case, tmp_path):
    """Where transformers reads no such file: its model with the file's tensors, by the table that it has of names."""
    model = model_for(case)
    path = written(tmp_path / "x.gguf", model, random(model))
    found, reader = logits(model, parameters(open_gguf(path))), gguf.GGUFReader(path)
    raw = json_of(model)
    config = {name: value for name, value in raw.items() if name not in ("architectures", "model_type", "rope_scaling")}
    peer = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(raw["model_type"], **config), attn_implementation="eager"
    ).eval()
    arch = reader.fields["general.architecture"].contents()
    names = get_gguf_hf_weights_map(peer, TensorProcessor(), arch)
    heads = {"attn_q": 4, "attn_k": 2} if arch == "llama" else {}
    state = {names[tensor.name]: in_order(tensor, heads) for tensor in reader.tensors}
    allowed = {
        gguf.TENSOR_NAMES[one] for one in gguf.MODEL_TENSORS[next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch)]
    }
    pattern = {name.format(bid=i) for name in allowed for i in range(model.n_layers)}
    assert {tensor.name.rsplit(".", 1)[0] for tensor in reader.tensors} <= pattern
    assert not peer.load_state_dict(state, strict=False).unexpected_keys
    assert state.keys() == peer.state_dict().keys()
    with torch.no_grad():
        expected = peer(input_ids=ids_for(model)).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def in_order(tensor, heads):
    """A tensor with transformers' order of rows, by its own way of turning llama.cpp's around."""
    weights = torch.from_numpy(np.array(tensor.data))
    count = heads.get(tensor.name.split(".")[-2], 0)
    if not count:
        return weights
    return weights.reshape(count, -1, 2, *weights.shape[1:]).transpose(1, 2).reshape(weights.shape)


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        (
            "olmo3",
            {"layer_types": ["full_attention", "sliding_attention"] * 4},
            "as olmo2: olmo2.attention.sliding_window_pattern is ",
        ),
        ("olmo2", {"head_dim": 8}, "attention.key_length is 8"),
        ("olmo2", {"attention_bias": True}, "as olmo2 it would differ in --model.attention-bias"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            "as qwen3: qwen3.attention.s",
        ),
        ("gemma3", {"query_pre_attn_scalar": 100}, "as gemma3 it would differ in --model.score-scale"),
        ("gemma3", {"rope_local_base_freq": 5e3}, "as gemma3 it would differ in --model.rope-theta"),
        ("llama-3", {"rope_parameters": LLAMA3 | {"high_freq_factor": 5.0}}, "as llama it would differ in --model.rope-sc"),
    ],
)
def test_models_that_llama_cpp_does_not_compute_are_refused(case, changes, said, tmp_path):
    model = model_for(case, **changes)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
        written(tmp_path / "x.gguf", model, random(model))
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_number_that_is_too_large_is_named(tmp_path):
    model = model_for("llama")
    params = random(model)
    params["embed"][3, 4] = 1e6
    with pytest.raises(ValueError, match=r"token_embd.weight holds 1e\+06, and f16 ends at 65,504; take --dtype f32"):
        written(tmp_path / "x.gguf", model, params, "f16")
    assert not list(tmp_path.iterdir())


TEXTS = [
    "The year 2024, don't!  \n\n  Zürich is 12345 km away.\tna\u00efve \u4f60\u597d <|endoftext|> x==y+=1;",
    " leading, trailing \n",
    "",
]


PRE = {
    "gpt-2": pre_tokenizers.ByteLevel(False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "qwen2": split(QWEN2),
    "dbrx": None,
    "llama-bpe": split(CL100K),
}


@pytest.mark.parametrize("name", PRE)
def test_a_tokenizer_is_rebuilt(name, tmp_path):
    """Also without the copy of the tokenizer.json, by us and by transformers, as files of others have none."""
    text = trained(PRE[name], **({"ignore_merges": True} if name == "llama-bpe" else {}))
    before = tokenizers.Tokenizer.from_str(text)
    described = describe(text, 410, {"eos": "<|im_end|>"}, 0, TEMPLATE)
    metadata = dict(described.metadata)
    assert (metadata[f"{KEY}pre"], metadata[f"{KEY}eos_token_id"], described.note) == (name, 1, "")
    assert metadata[f"{KEY}token_type"][:3] == [3, 3, 1]
    assert metadata[f"{KEY}token_type"][400:402] == [4, 5]
    assert rebuilt(metadata) == text
    del metadata[JSON]
    model = model_for("llama", vocab_size=410)
    file = open_gguf(written(tmp_path / "x.gguf", model, random(model), "q8_0", metadata))
    after = tokenizers.Tokenizer.from_str(rebuilt(file.metadata))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for one in [*TEXTS, "a<|im_end|>b<think>c"]:
        expected = before.encode(one).ids
        assert after.encode(one).ids == expected
        assert theirs(one, add_special_tokens=False).input_ids == expected
        assert after.decode(expected, skip_special_tokens=False) == one


def test_the_first_token_of_a_text_is_put_there(tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained(PRE["llama-bpe"], ignore_merges=True))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_end|> $A", pair="<|im_end|> $A <|im_end|> $B", special_tokens=[("<|im_end|>", 1)]
    )
    metadata = describe(backend.to_str(), 401, {}, 0).metadata
    assert (metadata[f"{KEY}add_bos_token"], metadata[f"{KEY}bos_token_id"]) == (True, 1)
    again = tokenizers.Tokenizer.from_str(rebuilt({key: value for key, value in metadata.items() if key != JSON}))
    assert again.encode("x").ids == backend.encode("x").ids
    assert again.encode("x").ids[0] == 1


@pytest.mark.parametrize(
    ("pre_tokenizer", "said"),
    [(pre_tokenizers.Whitespace(), "is no byte-level BPE"), (split(r"\w+"), "has no name for the pre-tokenizer")],
)
def test_other_tokenizers_are_refused(pre_tokenizer, said):
    with pytest.raises(ValueError, match=said):
        describe(trained(pre_tokenizer), 410, {}, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a published model with tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("gguf")
    source = with_tokenizer(directory("llama", folder / "published", vocab_size=320))
    assert cli.main(["convert", "from-hf", str(source), str(folder / "run")]) == 0
    return folder / "run"


def test_there_and_back_by_the_commands(run, tmp_path, capsys):
    """The checkpoint, the tokenizer, the chat template and the ids of special tokens are the same."""
    file, again = tmp_path / "model.gguf", tmp_path / "again"
    assert cli.main(["convert", "to-gguf", str(run), str(file), "--dtype", "f32"]) == 0
    said = capsys.readouterr()
    assert f"{file}: the params of {run} after step 0, in f32, {file.stat().st_size:,} bytes" in said.out
    assert "it is given the nearest (dbrx)" in said.err
    assert cli.main(["convert", "from-gguf", str(file), str(again)]) == 0
    assert f"{again}: llama, " in capsys.readouterr().out
    assert same_bits(load_parameters(run)[1], load_parameters(again)[1])
    assert (again / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    kept = again / "huggingface"
    assert (kept / "chat_template.jinja").read_text() == TEMPLATE
    config = json.loads((kept / "config.json").read_text())
    assert (config["eos_token_id"], config["max_position_embeddings"]) == (0, 64)
    assert json.loads((kept / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert cli.main(["convert", "to-hf", str(again), str(tmp_path / "hf"), "--verify"]) == 0
    assert "the same model" in capsys.readouterr().out


def test_a_file_without_a_tokenizer(run, tmp_path, capsys):
    file, again = tmp_path / "model.gguf", tmp_path / "again"
    assert cli.main(["convert", "to-gguf", str(run), str(file), "--no-tokenizer"]) == 0
    assert cli.main(["convert", "from-gguf", str(file), str(again)]) == 0
    assert "it holds no tokenizer; the run has none" in capsys.readouterr().err
    assert not (again / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "llama"}, "its tokenizer is of the kind llama, and only byte-level BPE"),
        ({"pre": "tekken", JSON: ""}, "its pre-tokenizer is tekken"),
        ({"token_type": [1, 1]}, "its tokenizer is damaged"),
        ({"bos_token_id": 10**6, "add_bos_token": True, JSON: ""}, "its tokenizer is damaged"),
        ({"tokens": ["a", "b"], "token_type": [1, 1]}, "holds other tokens"),
    ],
)
def test_a_tokenizer_that_is_not_read_is_left_out(changes, said, tmp_path, capsys):
    """The weights are read all the same, and a line says why."""
    metadata = describe(trained(PRE["dbrx"]), 401, {}, 0).metadata
    metadata |= {key if key == JSON else KEY + key: value for key, value in changes.items()}
    model = model_for("llama", vocab_size=401)
    file = written(tmp_path / "x.gguf", model, random(model), "f32", metadata)
    assert cli.main(["convert", "from-gguf", str(file), str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert said in error
    assert "the run has none, --data.tokenizer names another" in error
    assert not (tmp_path / "run" / "tokenizer.json").exists()


def test_how_much_is_turned_at_once_changes_nothing(tmp_path, monkeypatch):
    model = model_for("llama")
    params = random(model)
    whole = written(tmp_path / "a" / "x.gguf", model, params, "q8_0").read_bytes()
    monkeypatch.setattr(gguf_file, "READ_BYTES", 700)
    small = written(tmp_path / "b" / "x.gguf", model, params, "q8_0")
    assert small.read_bytes() == whole
    found = parameters(open_gguf(small))
    monkeypatch.setattr(gguf_file, "READ_BYTES", 1 << 20)
    assert same_bits(found, parameters(open_gguf(small)))


# Files that are not what they say


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model = model_for("llama")
    return written(tmp_path_factory.mktemp("good") / "x.gguf", model, random(model), "q8_0").read_bytes()


def with_key(key, value):
    """Another file, with one key more."""

    def spoil(data, path):
        model = model_for("llama")
        return written(path, model, random(model), "q8_0", NO_TOKENIZER | {key: value}).read_bytes()

    return spoil


def renamed(old, new):
    return lambda data, path: data.replace(old, new)


def kind_of_numbers(data, path):
    """The first matrix is said to be of 32-bit integers: 24 in the table of types is that of 8-bit ones."""
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    return data[:at] + (26).to_bytes(4, "little") + data[at + 4 :]


def swapped_shape(data, path):
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4
    return data[:at] + data[at + 8 : at + 16] + data[at : at + 8] + data[at + 16 :]


def endless_list(data, path):
    """A list that is said to have 2^60 bytes."""
    key = b"tokenizer.ggml.model"
    at = data.index(key) + len(key)
    return data[:at] + (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data, path: b"", "it is no GGUF file"),
        (lambda data, path: b"PK" + data, "it is no GGUF file"),
        (lambda data, path: data[:10], "cut off, 10 bytes"),
        (lambda data, path: data[:300], "cut off, 300 bytes"),
        (lambda data, path: data[:-100], "cut off"),
        (lambda data, path: data[:4] + b"\x09" + data[5:], "damaged, or of a newer form"),
        (endless_list, "cut off"),
        (
            renamed((5).to_bytes(8, "little") + b"llama", (5).to_bytes(8, "little") + b"gemma"),
            "the architecture gemma is not read here; there are llama, olmo2, qwen3, gemma3",
        ),
        (with_key("llama.attention.scale", 0.5), "llama.attention.scale is 0.5"),
        (with_key("llama.expert_count", 8), "llama.expert_count is 8"),
        (with_key("llama.block_count", 1 << 31), "llama.block_count is 2147483648; the file has"),
        (with_key("llama.rope.freq_base", "x"), "llama.rope.freq_base"),
        (with_key("split.count", 3), "split.count is 3"),
        (with_key("general.type", "adapter"), 'general.type is "adapter"'),
        (with_key("llama.attention.head_count", 3), "num_attention_heads"),
        (with_key("llama.rope.scaling.type", "longrope"), 'llama.rope.scaling.type is "longrope"; only none, linear and yarn'),
        (renamed(b"blk.0.ffn_up", b"blk.0.ffn_pu"), "missing: blk.0.ffn_up.weight; not of this model: blk.0.ffn_pu.weight"),
        (swapped_shape, "blk.0.ffn_up.weight is [64, 96], and [96, 64] by the metadata"),
        (kind_of_numbers, "token_embd.weight is quantised as I32, which the package gguf does not read"),
    ],
)
def test_bad_files_are_one_line(spoil, said, good, tmp_path, capsys):
    path = tmp_path / "bad.gguf"
    path.write_bytes(spoil(good, tmp_path / "made" / "x.gguf"))
    assert cli.main(["convert", "from-gguf", str(path), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert said in error
    assert "bad.gguf" in error
    assert not (tmp_path / "run").exists()


def test_a_missing_file_and_one_that_is_there(run, tmp_path, capsys):
    assert cli.main(["convert", "from-gguf", str(tmp_path / "none.gguf"), str(tmp_path / "run")]) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err
    (tmp_path / "x.gguf").write_text("mine")
    assert cli.main(["convert", "to-gguf", str(run), str(tmp_path / "x.gguf")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_without_the_package(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert cli.main(["convert", "to-gguf", str(run), str(tmp_path / "x.gguf")]) == 2
    assert "pip install 'olmo-fn[gguf]'" in capsys.readouterr().err
