"""Instances, order and labels are OLMo-core's, exactly."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from olmo_fn.data.instances.fixed import Windows
from olmo_fn.data.loader import Loader, labels_of
from olmo_fn.data.shuffle import permutation
from olmo_fn.data.sizes import constant_sizes
from olmo_fn.data.tokens import open_masks, open_tokens

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"


def read(name):
    return json.loads((FIXTURES / name).read_text())


@pytest.fixture
def folder(tmp_path):
    files = read("files.json")
    for name, tokens in files["tokens"].items():
        np.array(tokens, "<u2").tofile(tmp_path / name)
    for name, mask in files["masks"].items():
        np.array(mask, np.bool_).tofile(tmp_path / name.replace(".npy", ".mask.npy"))
    return tmp_path


@pytest.mark.parametrize("case", range(4))
def test_instances(folder, case):
    case = read("fsl.json")[case]
    files = tuple(open_tokens(str(folder / name), "uint16") for name in case["settings"]["paths"])
    masks = open_masks([str(folder / m) for m in case["settings"].get("label_mask_paths", ())], files)
    windows = Windows(files, case["settings"]["sequence_length"], 256, masks)
    assert len(windows) == case["num_instances"]
    arrays = windows.read(np.arange(len(windows)))
    assert arrays["input_ids"].tolist() == [i["input_ids"] for i in case["instances"]]
    assert arrays.keys() == {"input_ids", *(("label_mask",) if masks else ())}
    if masks:
        assert arrays["label_mask"].astype(int).tolist() == [i["label_mask"] for i in case["instances"]]


@pytest.mark.parametrize("key", ["plain", "label_mask", "attention_mask", "instance_mask", "all"])
def test_labels(key):
    case = read("batches.json")
    masks = {
        "label_mask": np.array(case["label_mask"], bool),
        "attention_mask": np.array(case["attention_mask"], bool),
        "instance_mask": np.array(case["instance_mask"], bool)[:, None],
    }
    chosen = {"plain": [], "all": list(masks)}.get(key, [key])
    ids = np.array(case["input_ids"])
    mask = np.logical_and.reduce([np.ones_like(ids, bool), *(np.broadcast_to(masks[m], ids.shape) for m in chosen)])
    assert labels_of(ids, mask if chosen else None).tolist() == case["get_labels"][key]


def shuffled_orders():
    return [
        case
        for case in read("loader.json")["orders"]
        if case.get("shuffle", True) and not case.get("max_target_sequence_length")
    ]


class NoInstances:
    """Order does not depend on what is in the instances."""


def in_order(size, num_instances, seed):
    return Loader(NoInstances(), constant_sizes(size, 4), seed, num_instances)


@pytest.mark.parametrize("case", range(len(shuffled_orders())))
def test_order(case):
    case = shuffled_orders()[case]
    size, world = case["global_batch_size"] // case["sequence_length"], case["dp_world_size"]
    loader = in_order(size, case["dataset_size"], case["seed"])
    per_epoch = loader.steps_per_epoch
    assert per_epoch == case["total_batches"]
    first = (case["epoch"] - 1) * per_epoch
    for rank, expected in enumerate(case["index_per_rank"]):
        ours = [
            loader.numbers(step)[rank::world].tolist()  # OLMo-core's ranks take every world-th
            for step in range(first, first + per_epoch)
        ]
        assert ours == expected


@pytest.mark.parametrize("case", range(5))
def test_resume_into_another_batch_size_and_world(case):
    """OLMo-core's resumed loader goes on in the same epoch order; ours is asked for that step."""
    case = read("loader.json")["resume"][case]
    size, world = case["global_batch_size_after"] // case["sequence_length"], case["dp_world_size_after"]
    loader = in_order(size, 89, case["seed"])
    per_epoch = loader.steps_per_epoch
    first = (case["epoch"] - 1) * per_epoch
    for rank, expected in enumerate(case["after_per_rank"]):
        steps = range(first + case["resumed_batches_processed"], first + per_epoch)
        ours = [loader.numbers(step)[rank::world].tolist() for step in steps]
        assert ours == expected


@pytest.mark.parametrize("case", range(3))
def test_large_permutations(case):
    case = read("loader.json")["large"][case]
    order = permutation(case["n"], case["seed"], case["epoch"])
    assert order[:32].tolist() == case["first32"]
    assert order[-4:].tolist() == case["last4"]
    assert hashlib.sha256(order.astype("<u4").tobytes()).hexdigest() == case["sha256_uint32_le"]


def test_batches_put_it_together(folder):
    """The first batch of OLMo-core's order over the fixture files, labels masked, as two ranks see it."""
    names = ["part-a", "part-b", "part-c"]
    files = tuple(open_tokens(str(folder / f"{n}.npy"), "uint16") for n in names)
    masks = open_masks([str(folder / f"{n}.mask.npy") for n in names], files)
    data = Loader(Windows(files, 4, 256, masks), constant_sizes(8, 4), seed=0, num_instances=89)
    order = next(c for c in shuffled_orders() if (c["dp_world_size"], c["epoch"], c["seed"]) == (2, 1, 0))
    stored = read("files.json")
    rows = [[name, i] for name in names for i in range(len(stored["tokens"][f"{name}.npy"]) // 4)]
    for rank in range(2):
        batch = {name: x[rank::2] for name, x in data(0).items()}
        for row, index in enumerate(order["index_per_rank"][rank][0]):
            name, i = rows[index]
            ids = stored["tokens"][f"{name}.npy"][4 * i : 4 * i + 4]
            keep = stored["masks"][f"{name}.npy"][4 * i : 4 * i + 4]
            assert batch["input_ids"][row].tolist() == ids
            expected = [t if k else -100 for t, k in zip(ids[1:], keep[1:], strict=True)] + [-100]
            assert batch["labels"][row].tolist() == expected
