"""What is read from a directory of transformers computes what transformers does, and is written again with the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import same_bits
from hf_peers import CASES, directory, peer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from olmo_fn import tree
from olmo_fn.cli import main as cli
from olmo_fn.core.chain import IGNORE
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.formats import tensors
from olmo_fn.formats.huggingface import names_in, open_directory
from olmo_fn.formats.hybrids import NORMS
from olmo_fn.models import transformer
from olmo_fn.spec import Box


def params_of(folder):
    found = open_directory(folder)
    return found, tree.unflatten((path, found.parameter(path)) for path in found.names)


def of_tokens(model):
    """The model without losses of routers, which transformers adds only where it is asked for them."""

    def block(one):
        network = one.feed_forward
        return replace(one, feed_forward=replace(network, balance_loss=0.0)) if network.num_experts else one

    return replace(model, block=block(model.block), pattern=tuple(map(block, model.pattern)))


def in_files(found, tensors):
    """Tensors of transformers' modules, under the names and in the parts that files have."""
    tensors = dict(tensors)
    for one in {one.name: one for one in found.names.values()}.values():
        if one.name not in tensors and "_layer_norm" in one.name:
            module = next(module for theirs, module in NORMS if theirs in one.name)
            tensors[one.name] = tensors[".".join([*one.name.split(".")[:3], module, "weight"])]
        elif one.name not in tensors and one.name.endswith("q_conv1d.weight"):
            parts = [one.name.replace("q_conv1d", f"{x}_conv1d") for x in "qkv"]
            heights = [found.tensors[part].shape[0] for part in parts]
            tensors |= zip(parts, tensors[one.name.replace("q_conv1d", "conv1d")].split(heights), strict=True)
    return tensors


def of_modules(tensors):
    """The inverse, whatever the parts are."""
    found = {}
    for name, tensor in tensors.items():
        for theirs, module in NORMS:
            name = name.replace(theirs, module)
        if "q_conv1d" in name:
            parts = [tensors[name.replace("q_conv1d", f"{x}_conv1d")] for x in "qkv"]
            found[name.replace("q_conv1d", "conv1d")] = torch.cat(parts)
        elif "_conv1d" not in name:
            found[name] = tensor
    return found


def relative(found, expected):
    """The largest difference, in units of the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


real = tensors._read_into
FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"


def experts_of(tensors):
    """Routers and experts of OLMo-core as transformers has them; its own converter turns w1 and w3 the wrong way."""
    found, ways = {}, {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for layer in range(2):
        here, there = f"param.blocks.{layer}.feed_forward_moe.", f"model.layers.{layer}.mlp."
        found[f"{there}gate.weight"] = tensors[f"{here}router.weight"].view(6, 32)
        for ours, theirs in ways.items():
            for i, matrix in enumerate(tensors[f"{here}experts.mlp.{ours}"].view(6, 12, 32)):
                found[f"{there}experts.{i}.{theirs}.weight"] = matrix.T if ours == "w2" else matrix
    return found


@pytest.mark.parametrize(
    "name", ["gemma3", "llama3_stepwise", "olmo2_gqa", "olmo2_mha", "olmo3_swa", "olmo3_swa_yarn", "olmoe_dropless", "qwen3"]
)
def test_a_directory_with_the_weights_of_olmo_core_computes_its_numbers(name, tmp_path):
    """Without transformers: config.json and names are those that OLMo-core's models have there, logits and loss its own."""
    facts, tensors = json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")
    offsets = facts["hf"]["olmo_weight_minus_hf_weight"]
    names = {here: there for here, there in facts["hf"]["names"].items() if f"param.{here}" in tensors}  # but for a tied head
    weights = {there: tensors[f"param.{here}"] - offsets.get(here, 0) for here, there in names.items()}
    if name == "olmoe_dropless":
        weights |= experts_of(tensors)
    save_file({there: weight.contiguous() for there, weight in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(facts["hf"]["config"]))
    found, params = params_of(tmp_path)
    batch = {key: tensors[key] for key in ("input_ids", "labels")}
    torch.testing.assert_close(transformer.logits(found.model, params, batch), tensors["logits"], rtol=1e-5, atol=2e-5)
    _, metrics = transformer.loss(found.model)(params, batch)
    assert metrics["ce"].item() / int((batch["labels"] != IGNORE).sum()) == pytest.approx(facts["mean"]["ce_loss"], rel=1e-5)


def test_all_families_are_among_the_cases():
    from olmo_fn.formats.config_json import EVERY

    assert {family.model_type for family in EVERY} == {kind for kind, _ in CASES.values()}


STACKED = [case for case in CASES if "moe" in case or case.startswith(("mixtral", "flex", "qwen3_next"))]


@pytest.mark.parametrize("case", STACKED)
def test_experts_that_are_stacked_are_the_same(case, tmp_path):
    """As transformers 5 saves what it has in memory: the same parameters, and the same part of one."""
    theirs = peer(case)
    theirs.save_pretrained(tmp_path / "apart", max_shard_size="20KB")
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    apart, stacked = open_directory(tmp_path / "apart"), open_directory(tmp_path / "stacked")
    assert any(name.split for name in apart.names.values())
    assert not any(name.split for name in stacked.names.values())
    for path in apart.names:
        assert same_bits({path: apart.parameter(path)}, {path: stacked.parameter(path)})
        if ".experts." in path:
            box = Box((1, 2, 3), (2, 5, 7))
            assert apart.parameter(path, box).equal(apart.parameter(path)[box.slices])
            assert stacked.parameter(path, box).equal(apart.parameter(path)[box.slices])


@pytest.mark.parametrize("stacked", [False, True])
def test_of_experts_only_those_in_the_box_are_read(stacked, tmp_path, monkeypatch):
    """A rank of ep reads its own experts: bytes that are read, counted."""
    peer("olmoe").save_pretrained(tmp_path, save_original_format=not stacked)
    found, total = open_directory(tmp_path), []
    monkeypatch.setattr(
        tensors, "_read_into", lambda file, out, start, path: (total.append(len(out)), real(file, out, start, path))
    )
    for name, (width, height) in {"w_gate": (32, 48), "w_up": (32, 48), "w_down": (48, 32)}.items():
        total.clear()
        found.parameter(f"blocks.1.moe.experts.{name}", Box((2, 0, 0), (2, width, height)))
        assert sum(total) == 2 * 32 * 48 * 4


@pytest.mark.parametrize("case", ["qwen3_5", "qwen3_next"])
def test_of_tensors_that_are_shared_only_the_rows_in_the_box_are_read(case, tmp_path, monkeypatch):
    """The last third of each parameter's columns, which are rows there, of two of three turns or of all: bytes counted."""
    peer(case, linear_num_key_heads=3, linear_num_value_heads=6).save_pretrained(tmp_path)
    found, total = open_directory(tmp_path), []
    monkeypatch.setattr(
        tensors, "_read_into", lambda file, out, start, path: (total.append(len(out)), real(file, out, start, path))
    )
    shared = {path: name for path, name in found.names.items() if name.rows and path.startswith("blocks.0.attention")}
    assert len(shared) == {"qwen3_5": 6, "qwen3_next": 9}[case]
    for path, name in shared.items():
        whole, dim = found.parameter(path), 1 if name.transposed else 0
        n = name.here[dim]
        offset, shape = [0] * whole.ndim, list(name.here)
        offset[dim], shape[dim] = n // 3, n - n // 3 - 1
        total.clear()
        box = Box(tuple(offset), tuple(shape))
        assert found.parameter(path, box).equal(whole[box.slices])
        assert sum(total) == 4 * shape[dim] * whole.numel() // n


def test_a_layer_that_predicts_further_tokens_is_passed_over(tmp_path):
    """Released files of Qwen 3-Next have one, of which their config.json says nothing; other tensors are refused as ever."""
    peer("qwen3_next").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before, params = load_file(file), params_of(tmp_path)[1]
    save_file(before | {"mtp.fc.weight": torch.ones(32, 64)}, file)
    assert same_bits(params_of(tmp_path)[1], params)
    save_file(before | {"model.mtp.weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"not of this model: model\.mtp\.weight"):
        open_directory(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(case, tmp_path):
    theirs = peer(case)
    theirs.save_pretrained(tmp_path)
    found, params = params_of(tmp_path)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(found.model.vocab_size, (2, 40), generator=generator)
    targets = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, IGNORE)  # transformers shifts them itself
    labels = torch.cat((targets[:, 1:], torch.full((2, 1), IGNORE)), dim=1)
    out = theirs(input_ids=ids, labels=targets)
    out.loss.backward()

    assert relative(transformer.logits(found.model, params, {"input_ids": ids}), out.logits.detach()) < 1e-5
    grads, metrics = pipe(transformer.loss(of_tokens(found.model)), grad())(params, {"input_ids": ids, "labels": labels})
    assert float(metrics["loss"]) == pytest.approx(out.loss.item(), rel=1e-5)
    expected = in_files(found, {name: p.grad for name, p in theirs.named_parameters()})
    largest = max(float(g.abs().max()) for g in expected.values())
    names = names_in(found.raw, found.model, expected)  # in memory experts are stacked
    # In fp32 both sides are 1e-5 to 3e-5 from the gradients in fp64 where layers are recurrent (the gated norm amplifies).
    tolerance = 1e-4 if "linear_attention" in found.raw.get("layer_types", []) else 1e-5
    for path, g in tree.items(grads):
        there = names[path].ours(expected[names[path].name])
        assert float((g - there).abs().max()) <= tolerance * max(float(there.abs().max()), 1e-2 * largest), path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_from_and_to_keeps_the_bytes_of_every_tensor(case, dtype, tmp_path, capsys):
    source = directory(case, tmp_path / "in", dtype)
    assert cli.main(["convert", "from-hf", str(source), str(tmp_path / "run")]) == 0
    assert cli.main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    before, after = (of_modules(load_file(folder / "model.safetensors")) for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert old == {name: value for name, value in new.items() if name != "torch_dtype"}


@pytest.mark.parametrize("case", CASES)
def test_a_new_config_json_is_loaded_as_the_same_model(case, tmp_path):
    """Without the one that the weights came with: transformers reads what we write of the model alone."""
    from olmo_fn.formats.huggingface import write_directory

    theirs = peer(case)
    theirs.save_pretrained(tmp_path / "in")
    found, params = params_of(tmp_path / "in")
    write_directory(tmp_path / "out", found.model, tree.items(params), torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    ids = torch.randint(found.model.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
