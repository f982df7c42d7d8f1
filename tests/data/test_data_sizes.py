"""Batch sizes and sequence lengths that change: every token once, whatever the sizes, and no step depends on another."""

import numpy as np
import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.data.instances.fixed import Windows
from olmo_fn.data.loader import Loader
from olmo_fn.data.shuffle import permutation
from olmo_fn.data.sizes import Phase, Sizes, batch_phases, constant_sizes, length_phases, together
from olmo_fn.data.tokens import open_tokens
from olmo_fn.optim.schedules import constant, in_tokens, scale

QUICK = examples(40)
T = 8


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """89 windows of 8 tokens, each token another number."""
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.arange(89 * T, dtype=np.uint16).tofile(path)
    return Windows((open_tokens(str(path), "uint16"),), T, 89 * T)


@st.composite
def some_sizes(draw, lengths=(2, 4, 8)):
    """Up to four phases of any batch sizes and lengths."""
    starts = sorted(draw(st.sets(st.integers(1, 30), max_size=3)))
    pick = st.tuples(st.integers(1, 9), st.sampled_from(lengths))
    return Sizes(T, tuple(Phase(start, *draw(pick)) for start in (0, *starts)))


def check_every_token_once(windows, sizes, seed):
    data, constant = Loader(windows, sizes, seed, 89), Loader(windows, constant_sizes(sizes.largest, T), seed, 89)
    whole = data.steps_per_epoch * sizes.largest
    seen, step = [], 0
    while len(seen) < 2 * whole:
        batch, phase = data(step), sizes.at(step)
        assert batch["input_ids"].shape == (phase.batch_size * T // phase.sequence_length, phase.sequence_length)
        assert sizes.first_window(step) == len(seen)
        assert sizes.tokens_before(step) == len(seen) * T
        seen += batch["input_ids"].reshape(-1, T).tolist()
        step += 1
    order = [row for s in range(2 * constant.steps_per_epoch) for row in constant(s)["input_ids"].tolist()]
    assert seen[: 2 * whole] == order
    assert len({row[0] for row in seen[:whole]}) == whole


@QUICK
@given(some_sizes(), st.integers(0, 99))
def test_every_token_once_an_epoch(windows, sizes, seed):
    """The steps of an epoch hold each window of it once, in the order of the constant batches; then the next begins."""
    check_every_token_once(windows, sizes, seed)


class Multiplied(Sizes):
    """The mutant: where the step would be if every step before had had its batch size (tokens seen // batch size, as a trainer
    with one counter of batches has it)."""

    def first_window(self, step):
        return step * self.at(step).batch_size


def test_a_mutant_is_caught(windows):
    phases = (Phase(0, 2, 4), Phase(3, 4, 8))
    check_every_token_once(windows, Sizes(T, phases), 0)
    with pytest.raises(AssertionError):
        check_every_token_once(windows, Multiplied(T, phases), 0)


@QUICK
@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 99))
def test_constant_sizes_are_whole_batches_of_each_epoch(windows, batch_size, seed, step):
    """An epoch's order cut to whole batches, one a step, each row from where `origin` says."""
    data = Loader(windows, constant_sizes(batch_size, T), seed, 89)
    epoch, batch = divmod(step, 89 // batch_size)
    numbers = permutation(89, seed, epoch + 1)[batch * batch_size : (batch + 1) * batch_size]
    assert data.numbers(step).tolist() == numbers.tolist()
    assert data(step)["input_ids"][:, 0].tolist() == [8 * n for n in numbers]
    assert [data.origin(step, row).offset for row in range(batch_size)] == [8 * n for n in numbers]


@QUICK
@given(some_sizes(), st.integers(0, 60))
def test_the_origin_of_a_row_is_where_it_begins(windows, sizes, step):
    data = Loader(windows, sizes, 3, 89)
    ids = data(step)["input_ids"]
    assert len(ids) == sizes.rows(step)
    assert [data.origin(step, row) for row in range(len(ids))] == [(windows.files[0].path, n) for n in ids[:, 0].tolist()]


@QUICK
@given(some_sizes(), st.integers(0, 60))
def test_tokens_as_a_tensor(sizes, step):
    """The tensor function, which a schedule in tokens uses, is the exact count; it compiles."""
    assert sizes.tokens(torch.tensor(step)).item() == sizes.tokens_before(step)
    first = sizes.phases[0].batch_size
    for now in range(step, step + 2):  # schedules count steps from 1
        ratio = sizes.lr_ratio(torch.tensor(now + 1)).item()
        assert ratio == pytest.approx((sizes.at(now).batch_size / first) ** 0.5, rel=1e-12)
    rate = in_tokens(lambda tokens: tokens.double(), sizes.tokens)
    assert rate(torch.tensor(step)).item() == sizes.tokens_before(step)


def test_it_compiles():
    sizes = Sizes(T, (Phase(0, 2, 4), Phase(10, 4, 8)))
    schedule = scale(in_tokens(constant(1.0), sizes.tokens), sizes.lr_ratio)
    compiled = torch.compile(schedule, fullgraph=True, backend="eager")
    for step in (1, 10, 11, 50):
        assert compiled(torch.tensor(step)) == schedule(torch.tensor(step)) == (1.0 if step <= 10 else 2**0.5)


@QUICK
@given(st.data())
def test_batch_sizes_by_tokens(data):
    """A size begins with the first step before which its number of tokens was seen."""
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, 4000), min_size=1, max_size=3)))]
    batch_sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(starts), max_size=len(starts)))
    try:
        sizes = together(T, batch_phases(batch_sizes, starts, T, "tokens"), [(0, T)])
    except ValueError:
        return  # two begin with the same step
    for step in range(60):
        seen = sizes.tokens_before(step)
        expected = max(i for i, start in enumerate(starts) if start <= seen)
        assert sizes.at(step).batch_size == batch_sizes[expected]


@QUICK
@given(st.sampled_from([128, 256, 512]), st.integers(1, 500), st.sampled_from([1024, 2048]), st.booleans())
def test_lengths_follow_the_line(shortest, steps, window, truncate):
    """The largest allowed length that the line has reached, from the shortest to the whole window, never beyond."""
    phases = length_phases(shortest, steps, window, 128, truncate)
    sizes = together(window, [(0, 1)], phases, truncate)
    allowed = [n for n in range(128, window + 1, 128) if truncate or window % n == 0]
    for step in range(0, steps + 5, max(1, steps // 50)):
        line = shortest + (window - shortest) * min(1.0, step / steps)
        assert sizes.at(step).sequence_length == max(n for n in allowed if n <= line + 1e-9)
    assert sizes.at(steps).sequence_length == window


def test_truncate_takes_the_beginning(windows):
    """Half of each window, and the count says so."""
    sizes = Sizes(T, (Phase(0, 3, 4, used=4), Phase(5, 3, 8)))
    data, whole = Loader(windows, sizes, 0, 89), Loader(windows, constant_sizes(3, T), 0, 89)
    assert torch.equal(data(2)["input_ids"], whole(2)["input_ids"][:, :4])
    assert (sizes.tokens_before(5), sizes.tokens_before(6)) == (60, 84)
    assert (data(2)["labels"][:, -1] == -100).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sizes(T, (Phase(1, 2, 4),)), "must begin at step 0 .* not 1"),
        (lambda: Sizes(T, (Phase(0, 2, 4), Phase(0, 2, 8))), "their steps must grow, not 0, 0"),
        (lambda: Sizes(T, (Phase(0, 2, 3),)), "sequences of 3 do not fill windows of 8"),
        (lambda: Sizes(T, (Phase(0, 0, 4),)), "a batch of 0 x 4 is too small"),
        (lambda: batch_phases([2, 4], [0], T), "2 batch sizes begin at 0; give one start for each"),
        (lambda: batch_phases([2, 4], [5, 9], T), "2 batch sizes begin at 5, 9; give one start for each, the first 0"),
        (lambda: length_phases(100, 10, 1024), "from 100 to 1024 must be multiples that divide it of 128; there are 128, 256"),
        (lambda: length_phases(384, 10, 1024), "from 384 to 1024 must be multiples that divide it of 128"),
        (lambda: length_phases(128, 0, 1024), "must grow over at least 1 step, not 0"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
