"""Documents are masked: what the model makes of a row is what it makes of each document alone."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from programs import python

from olmo_fn.data.instances import Instances, Origin
from olmo_fn.data.instances.documents import MaskedDocuments, document_numbers
from olmo_fn.data.loader import IGNORE, Loader
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import Phase, Sizes, constant_sizes
from olmo_fn.data.source import open_data
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.spec import init
from olmo_fn.train.observers import read_metrics

EOS, T = 0, 16
MODEL = dense(16, 2, 2, 32, vocab_size=50, window_pattern=(5,))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """60 windows of 16 tokens, in documents of about five."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(60 * T) < 0.2, EOS, rng.integers(1, 50, 60 * T))
    path = tmp_path_factory.mktemp("documents") / "tokens.npy"
    tokens.astype(np.uint8).tofile(path)
    return str(path)


def opened(path, sizes=None, **settings):
    data = Data((path,), heldout_fraction=0.0, **{"mask_documents": True, "eos_id": EOS, **settings})
    return open_data(data, 50, sizes or constant_sizes(4, T))


@given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=4))
def test_a_token_is_in_the_document_of_the_token_before_unless_that_ends_it(rows):
    numbers = document_numbers(np.array(rows), EOS)
    assert numbers.dtype == np.int64
    for row, own in zip(rows, numbers.tolist(), strict=True):
        assert own[0] == 0
        assert [b - a for a, b in itertools.pairwise(own)] == [int(token == EOS) for token in row[:-1]]


GROWING = Sizes(T, (Phase(0, 4, T), Phase(1, 3, 8), Phase(2, 3, 4), Phase(3, 2, 12, used=12)))


@examples(8)
@given(st.integers(0, 3))
def test_law_each_document_has_the_logits_that_it_has_alone(path, step):
    """For whole windows, windows cut in two and in four, and their beginnings alone."""
    batch = opened(path, GROWING).train(step)
    assert {x.shape for x in batch.values()} == {(GROWING.rows(step), (16, 8, 4, 12)[step])}
    params = init(transformer.specs(MODEL), 0, dtype=torch.float64)
    whole = transformer.logits(MODEL, params, batch)
    pieces = 0
    for ids, documents, logits in zip(batch["input_ids"], batch["documents"], whole, strict=True):
        for number in documents.unique():
            alone = transformer.logits(MODEL, params, {"input_ids": ids[None, documents == number]})
            torch.testing.assert_close(logits[documents == number], alone[0], rtol=0, atol=1e-12)
            pieces += 1
    assert pieces > len(whole)
    without = {name: x for name, x in batch.items() if name != "documents"}
    assert (transformer.logits(MODEL, params, without) - whole).abs().max() > 1e-3  # the law would notice


def test_only_what_the_model_sees_changes(path):
    """Input ids and labels are those of a run without; the end of a document predicts the next one's first token."""
    masked, plain = opened(path).train, opened(path, mask_documents=False).train
    assert plain(0).keys() == {"input_ids", "labels"}
    for step in range(plain.steps_per_epoch):
        batch = masked(step)
        for name, x in plain(step).items():
            assert torch.equal(batch[name], x)
    ends = (batch["input_ids"][:, :-1] == EOS).nonzero()
    assert len(ends)
    assert all(batch["labels"][row, i] == batch["input_ids"][row, i + 1] != IGNORE for row, i in ends.tolist())


def test_every_rank_has_the_documents_of_its_rows(path):
    loader = opened(path, GROWING).train
    for step in range(4):
        parts = [loader(step, slice(row, row + 1))["documents"] for row in range(GROWING.rows(step))]
        for part, whole in zip(parts, loader(step)["documents"], strict=True):
            assert torch.equal(document_starts(part[0]), document_starts(whole))


def document_starts(documents):
    return torch.cat((torch.tensor([True]), documents[1:] != documents[:-1]))


class Interleaved(Instances):
    """Two documents that take turns: no end-of-document token tells them apart."""

    def __len__(self):
        return 10

    def read(self, numbers):
        ids = np.broadcast_to(np.arange(T), (len(numbers), T)) + T * numbers[:, None]
        return {"input_ids": ids, "documents": ids % 2, "labels": np.where(ids + 2 < 160, ids + 2, IGNORE)}

    def origin(self, number):
        return Origin("memory", T * number)


def test_instances_that_know_better_are_asked():
    """Labels and documents of the instances' own are taken as they are, and cut as the ids are."""
    loader = Loader(MaskedDocuments(Interleaved(), EOS), Sizes(T, (Phase(0, 2, 8),)), 0, 10)
    batch = loader(0)
    assert torch.equal(batch["documents"], batch["input_ids"] % 2)
    assert torch.equal(batch["labels"], torch.where(batch["input_ids"] < 158, batch["input_ids"] + 2, IGNORE))
    assert str(loader.origin(0, 1)) == f"memory from token {batch['input_ids'][1, 0]} on"
    with pytest.raises(ValueError, match=r"input_ids of step 0 are of shape \(2, 16\), not \(2, 32\)"):
        replace(loader, sizes=constant_sizes(2, 32))(0)
    with pytest.raises(ValueError, match="contiguous rows of a batch, not every 2th"):
        loader(0, slice(0, None, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_id": None}, "--data.mask-documents needs the id of the end-of-document token, and no meta.json"),
        ({"eos_id": 50}, "--data.eos-id is 50; it must be from 0 to below 50, the vocabulary"),
        ({"eos_id": -1}, "--data.eos-id is -1; it must be from 0"),
    ],
)
def test_wrong_settings(path, settings, message):
    with pytest.raises(ValueError, match=r".") as error:
        opened(path, **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_training(path, tmp_path):
    """By the command: two steps and an evaluation, with another loss than without; and one line for a wrong one."""
    common = f"""train.py olmo2-tiny --data.paths {path} --data.heldout-fraction 0.1 --model.d-model 32 --model.n-heads 2
        --model.hidden-size 64 --model.n-layers 1 --model.vocab-size 50 --schedule.warmup 0 --recipe.batch-size 4
        --recipe.sequence-length 16 --recipe.accumulate 2 --recipe.no-compile --growth.min-length 8 --growth.length-steps 1
        --growth.length-multiple 8 --run.steps 2 --run.threads 1 --run.sample= """
    losses = {}
    for name, flags in {"plain": "", "masked": "--data.mask-documents --data.eos-id 0"}.items():
        done = python(*(common + flags).split(), f"--run.folder={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        assert "held-out after step 2" in done.stdout
    assert len(losses["masked"]) == 2
    assert all(a != b for a, b in zip(*losses.values(), strict=True))
    done = python(*(common + "--data.mask-documents").split(), f"--run.folder={tmp_path / 'wrong'}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--data.mask-documents needs the id" in done.stderr
