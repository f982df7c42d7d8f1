"""llama.cpp itself, by the npm package node-llama-cpp: it loads what is written, with the same tokens and the same logits."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
import torch
from gguf_peers import CASES, logits, model_for, random, trained, written
from wheels import CACHE

from olmo_fn.formats.gguf_file import open_gguf
from olmo_fn.formats.gguf_tokenizer import describe

pytestmark = [pytest.mark.weights, pytest.mark.timeout(1200)]
VERSION = "3.22.1"
TEXT = "The year 2024, don't! def f(x): return x  # naïve\n\n\tif x:  你好"


@pytest.fixture(scope="module")
def llama_cpp():
    """The folder with the package and the script; skips the tests without node, or without network."""
    folder = CACHE / f"node-llama-cpp-{VERSION}"
    if shutil.which("npm") is None:
        pytest.skip("node-llama-cpp needs npm, which is not here")
    if not (folder / "node_modules" / "node-llama-cpp").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text("{}")
        words = ["npm", "install", "--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}"]
        done = subprocess.run([*words, *packages], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"node-llama-cpp cannot be installed: {(done.stderr.strip().splitlines() or ['?'])[0]}")
    shutil.copy(Path(__file__).with_name("llama_cpp.mjs"), folder)
    return folder


@pytest.mark.parametrize(("dtype", "most"), [("f32", 1e-5), ("q8_0", 0.1)])
def test_llama_cpp_computes_the_same(dtype, most, llama_cpp, tmp_path):
    """Probabilities of the next token, as a part of the largest. With q8_0 weights llama.cpp rounds activations to 8 bits too,
    and so is not to be compared closely. Its GELU, which Gemma has, is a table in fp16: what goes in and out is rounded to 11
    bits.
    """
    text = trained()
    ids = tokenizers.Tokenizer.from_str(text).encode(TEXT).ids
    (tmp_path / "ids.json").write_text(json.dumps(ids[:24]))
    metadata = describe(text, 410, {"eos": "<|im_end|>"}, 0).metadata
    expected = {}
    for case in CASES:
        model = model_for(case, vocab_size=410)
        file = open_gguf(written(tmp_path / f"{case}.gguf", model, random(model), dtype, metadata))
        params = {path: file.parameter(path) for path in file.places}
        expected[case] = logits(model, params, torch.tensor([ids[:24]]))[0].double().softmax(-1)
    subprocess.run(["node", "llama_cpp.mjs", str(tmp_path), TEXT], cwd=llama_cpp, check=True)
    lines = (tmp_path / "found.jsonl").read_text().splitlines()
    found = {Path(one["name"]).stem: one for one in map(json.loads, lines)}
    assert found.keys() == expected.keys()
    differences = {}
    for case, one in found.items():
        assert one["ids"] == ids, case
        p = torch.zeros_like(expected[case])
        for position, pairs in enumerate(one["probabilities"]):
            for token, probability in pairs:
                p[position, token] = probability
        differences[case] = float((p - expected[case]).abs().max() / expected[case].max())
    print(next(iter(found.values()))["release"], dtype, differences)
    assert all(one <= (max(most, 1e-3) if "gemma" in case else most) for case, one in differences.items()), differences
