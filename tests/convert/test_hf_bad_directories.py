"""Directories that are not what they say: each in one line, with exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from hf_peers import directory
from safetensors.torch import load_file, save_file

from olmo_fn.cli import main as cli
from olmo_fn.formats.huggingface import open_directory
from olmo_fn.models.config import MoE

W_Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A directory of several shards."""
    return directory("llama", tmp_path_factory.mktemp("good"), shard="20KB")


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it, to be spoiled."""
    shutil.copytree(good, tmp_path / "dir")
    return tmp_path / "dir"


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def one_file(folder, weights):
    """The directory with these weights in one file."""
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def missing(folder):
    weights = tensors(folder)
    one_file(folder, {name: weights[name] for name in weights if name != W_Q})


def extra(folder):
    one_file(folder, tensors(folder) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})


def wrongly_shaped(folder):
    weights = tensors(folder)
    one_file(folder, weights | {W_Q: weights[W_Q][:24]})


def other_dtype(folder):
    weights = tensors(folder)
    one_file(folder, weights | {W_Q: weights[W_Q].double()})


def quantized(folder):
    weights = tensors(folder)
    one_file(folder, weights | {W_Q: weights[W_Q].to(torch.int8)})


def head_that_is_not_the_embedding(folder):
    change_config(folder, tie_word_embeddings=True)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unsupported(folder):
    change_config(folder, architectures=["FalconForCausalLM"], model_type="falcon")


def ignored_key(folder):
    change_config(folder, logits_scaling=8.0)


def no_config(folder):
    (folder / "config.json").unlink()


def no_json(folder):
    (folder / "config.json").write_text("{")


def pickles(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def nothing(folder):
    for file in folder.glob("model*"):
        file.unlink()


def cut_off(folder):
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 100)


def cut_off_in_the_header(folder):
    os.truncate(sorted(folder.glob("*.safetensors"))[0], 20)


def empty_shard(folder):
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")


def pointer_of_lfs(folder):
    sorted(folder.glob("*.safetensors"))[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def outside(folder):
    change_index(folder, lambda files: files.update({W_Q: "../elsewhere/model-00001-of-00002.safetensors"}))


def absolute(folder):
    change_index(folder, lambda files: files.update({W_Q: "/etc/passwd"}))


def index_of_another(folder):
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    change_index(folder, lambda files: files.update({W_Q: next(name for name in names if name != files[W_Q])}))


def no_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def missing_expert(folder):
    weights = tensors(folder)
    one_file(folder, {name: weights[name] for name in weights if name != EXPERT})


def expert_of_another_shape(folder):
    weights = tensors(folder)
    one_file(folder, weights | {EXPERT: weights[EXPERT][:24]})


def one_expert_more(folder):
    weights = tensors(folder)
    one_file(folder, weights | {EXPERT.replace("2", "6"): weights[EXPERT].clone()})


def other_number(folder):
    change_config(folder, num_experts=4, num_local_experts=6)


def more_than_there_are(folder):
    change_config(folder, num_experts_per_tok=7)


def clipped(folder):
    change_config(folder, clip_qkv=8.0)


def dense_network(folder):
    weights = {name: x for name, x in tensors(folder).items() if "experts" not in name and "gate.weight" not in name}
    names = [f"model.layers.{i}.mlp.{way}_proj.weight" for i in range(3) for way in ("gate", "up")]
    one_file(folder, weights | {name: torch.zeros(48, 32) for name in names})


SPOILED_EXPERTS = [
    (missing_expert, f"missing: {EXPERT}"),
    (expert_of_another_shape, f"{EXPERT} is [24, 32], and [48, 32] by config.json"),
    (one_expert_more, "not of this model: model.layers.1.mlp.experts.6.up_proj.weight"),
    (other_number, "num_experts is 4; num_local_experts, another name of the same, is 6"),
    (more_than_there_are, "--model.top-k is 7, and there are 6 experts"),
    (clipped, "clip_qkv is 8.0; no model here computes that, only null"),
    (dense_network, "missing: model.layers.0.mlp.gate.weight, model.layers.0.mlp.experts.0.gate_proj.weight"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILED_EXPERTS, ids=[spoil.__name__ for spoil, _ in SPOILED_EXPERTS])
def test_experts_that_are_not_as_they_should_be(spoil, said, tmp_path, capsys):
    folder = directory("olmoe", tmp_path / "dir", shard="20KB")
    spoil(folder)
    assert cli.main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} == {"dir"}


def test_a_dense_directory_is_no_model_with_experts(good, capsys):
    """And the other way round nothing is advised."""
    model = open_directory(good).model
    sparse = replace(model, block=replace(model.block, feed_forward=MoE(num_experts=4, top_k=2)))
    with pytest.raises(ValueError, match=r"another model: .*feed-forward.name moe.*; olmo-fn convert upcycle makes a model"):
        open_directory(good, sparse)


SPOILED = [
    (missing, f"missing: {W_Q}"),
    (extra, "not of this model: model.layers.0.self_attn.q_proj.bias"),
    (wrongly_shaped, f"{W_Q} is [24, 32], and [32, 32] by config.json"),
    (other_dtype, f"{W_Q} is float64; weights are read in float32, bfloat16, float16"),
    (quantized, f"{W_Q} is int8; weights are read in"),
    (
        head_that_is_not_the_embedding,
        "lm_head.weight (another than model.embed_tokens.weight, though tie_word_embeddings is true)",
    ),
    (unsupported, "the architecture FalconForCausalLM is not read here; there are Olmo2ForCausalLM"),
    (ignored_key, "logits_scaling is 8.0; it is not known here, and would be ignored"),
    (no_config, "has no config.json"),
    (no_json, "config.json is no JSON"),
    (pickles, "has its weights in pytorch_model.bin, a pickle: reading one may run any program, so it is not read"),
    (nothing, "has neither model.safetensors nor model.safetensors.index.json"),
    (cut_off, "cut off, "),
    (cut_off_in_the_header, "cut off, it has 20 bytes"),
    (empty_shard, "cut off, it has 0 bytes"),
    (pointer_of_lfs, "it is no safetensors file; a file of Git LFS that was not fetched is a text of three lines"),
    (missing_shard, "cannot be read (No such file or directory)"),
    (outside, "'../elsewhere/model-00001-of-00002.safetensors'; only safetensors files beside the index are read"),
    (absolute, "'/etc/passwd'; only safetensors files beside the index are read"),
    (index_of_another, f"lacks {W_Q}, which model.safetensors.index.json says is there"),
    (no_index, "it is no index of safetensors files"),
]


def test_the_directory_is_read_before_it_is_spoiled(folder, tmp_path, capsys):
    assert cli.main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(("spoil", "said"), SPOILED, ids=[spoil.__name__ for spoil, _ in SPOILED])
def test_each_is_refused_in_one_line(spoil, said, folder, tmp_path, capsys):
    spoil(folder)
    assert cli.main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} == {"dir"}
