"""Pipeline schedules on paper: legal for all sizes, and the published bubbles and peaks."""

from collections import Counter
from itertools import pairwise

import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.parallel.pipeline.schedule import Action, schedule
from olmo_fn.parallel.pipeline.split import parse_split, split
from olmo_fn.planner.pipeline_simulate import Costs, simulate

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 3, 5, 8, 13, 16)]


@st.composite
def sizes(draw):
    kind = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero_bubble", "forward"]))
    chunks = {"interleaved": st.integers(2, 4), "gpipe": st.integers(1, 3), "forward": st.integers(1, 3)}
    return kind, draw(st.integers(1, 8)), draw(st.integers(1, 20)), draw(chunks.get(kind, st.just(1)))


# --- programs ---------------------------------------------------------------------------------------------------------


def law_programs(programs, kind, microbatches, chunks):
    """Each chunk of each rank sees each micro-batch once in every direction, in a legal order, and all ranks get to the end."""
    parts = {"forward": "F", "zero_bubble": "FIW"}.get(kind, "FB")
    for program in programs:
        wanted = [(op, c, k) for op in parts for c in range(chunks) for k in range(microbatches)]
        assert Counter(tuple(action) for action in program) == Counter(wanted)
        place = {tuple(action): i for i, action in enumerate(program)}
        for before, after in pairwise(parts):
            assert all(place[before, c, k] < place[after, c, k] for op, c, k in wanted if op == before)
    timeline = simulate(programs)
    ended = {(s.action, rank): s.end for rank, slots in enumerate(timeline.slots) for s in slots}
    for rank, slots in enumerate(timeline.slots):
        assert all(a.end <= b.start for a, b in pairwise(slots))
        for slot in slots:  # what an action needs from the virtual stages beside it, said in another way than the simulator's
            action, step = slot.action, 1 if slot.action.op == "F" else -1
            chunk, neighbour = divmod(action.chunk * len(programs) + rank - step, len(programs))
            if action.op != "W" and 0 <= chunk < chunks:
                assert ended[action._replace(chunk=chunk), neighbour] <= slot.start


@given(sizes())
@examples(150)
def test_programs(size):
    kind, _, microbatches, chunks = size
    law_programs(schedule(*size), kind, microbatches, chunks)


def edit(programs, rank, function):
    changed = list(programs)
    changed[rank] = tuple(function(list(programs[rank])))
    return tuple(changed)


def swapped(program, i, j):
    program[i], program[j] = program[j], program[i]
    return program


@pytest.mark.parametrize(
    "mutant",
    [
        lambda programs: edit(programs, 1, lambda p: p[:-1]),  # one backward is missing
        lambda programs: edit(programs, 2, lambda p: [*p[:3], p[0], *p[3:]]),  # a forward twice
        lambda programs: edit(programs, 3, lambda p: swapped(p, 0, 1)),  # backward before its forward
        lambda programs: edit(programs, 0, lambda p: [*p[:1], p[4], *p[1:4], *p[5:]]),  # waits for what waits for it
        lambda programs: (programs[1], programs[0], *programs[2:]),  # the programs of two ranks swapped
    ],
)
def test_mutants_of_programs_are_caught(mutant):
    programs = schedule("1f1b", 4, 6)
    law_programs(programs, "1f1b", 6, 1)
    with pytest.raises((AssertionError, ValueError)):
        law_programs(mutant(programs), "1f1b", 6, 1)


def test_deadlock_names_the_blocked_actions():
    F, B = (lambda k: Action("F", 0, k)), (lambda k: Action("B", 0, k))
    blocked = ((F(0), B(0), F(1), B(1)), (F(0), F(1), B(0), B(1)))
    with pytest.raises(ValueError, match=r"rank 0 at B\(chunk 0, microbatch 0\), stage 0, waits for B of stage 1; rank 1"):
        simulate(blocked)


# --- published formulas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble_of_gpipe_and_1f1b(kind, p, m):
    timeline = simulate(schedule(kind, p, m))
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.bubbles == pytest.approx([timeline.bubble] * p)
    assert timeline.peak_live == (tuple(min(p - r, m) for r in range(p)) if kind == "1f1b" else (m,) * p)


@pytest.mark.parametrize("v", [2, 3, 4])
@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= p])
def test_bubble_of_interleaved(p, m, v):
    """Also where p does not divide m, which the paper leaves out."""
    timeline = simulate(schedule("interleaved", p, m, v))
    assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1))
    if m % p == 0:
        assert timeline.peak_live == tuple(min(2 * (p - r - 1) + (v - 1) * p + 1, v * m) for r in range(p))
    assert simulate(schedule("forward", p, m, v)).bubble == pytest.approx((p - 1) / (v * m + p - 1))


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zero_bubble(p, m):
    """Table 1 of Qi et al. 2023: bubble (p - 1)(F + I - W) against (p - 1)(F + B), at the peak p of 1F1B's first rank."""
    zero, plain = simulate(schedule("zero_bubble", p, m)), simulate(schedule("1f1b", p, m))
    assert max(zero.peak_live) == max(plain.peak_live) == min(p, m)
    assert zero.ticks == 3 * m + p - 1 if m >= p else zero.ticks <= plain.ticks
    assert zero.bubble < plain.bubble if p > 1 and m > 1 else zero.bubble <= plain.bubble
    costs = Costs(F=2, B=5, I=3, W=2)
    if m >= p:
        assert simulate(schedule("zero_bubble", p, m), costs).ticks == 7 * m + (p - 1) * (2 + 3 - 2)


def test_costs_of_stages_and_transfers():
    assert simulate(schedule("1f1b", 2, 1), Costs(transfer=10)).ticks == 3 + 3 + 20
    heavy = simulate(schedule("forward", 2, 4), Costs(stages=(1, 3)))
    assert (heavy.ticks, heavy.bubbles) == (13, (pytest.approx(9 / 13), pytest.approx(1 / 13)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("1f2b", 2, 2), "'1f2b' is unknown; use one of gpipe, 1f1b, interleaved, zero_bubble, forward"),
        (("1f1b", 0, 2), "at least 1 of ranks, not 0"),
        (("gpipe", 2, 0), "at least 1 of microbatches, not 0"),
        (("interleaved", 2, 4, 1), "at least 2 chunks a rank, not 1; use 1f1b"),
        (("zero_bubble", 2, 4, 2), "zero_bubble has one chunk a rank, not 2; use interleaved"),
    ],
)
def test_refused(args, message):
    with pytest.raises(ValueError, match=message):
        schedule(*args)


# --- which blocks -----------------------------------------------------------------------------------------------------


def compositions(n, parts):
    return [(n,)] if parts == 1 else [(i, *rest) for i in range(n + 1) for rest in compositions(n - i, parts - 1)]


@given(st.integers(1, 7), st.integers(1, 5), st.sampled_from([0, 0.3, 1, 2.5]), st.sampled_from([0, 0.7, 1.5, 4]))
@examples(60)
def test_split_is_the_best_there_is(blocks, stages, embed, head):
    """By trying all: least cost of the dearest stage, and then the most even."""

    def quality(counts):
        costs = [n + embed * (i == 0) + head * (i == stages - 1) for i, n in enumerate(counts)]
        return round(max(costs), 9), round(sum(cost**2 for cost in costs), 9)

    if stages > blocks + 2:
        with pytest.raises(ValueError, match=f"are only {blocks + 2} parts"):
            split(blocks, stages, embed, head)
        return
    ranges = split(blocks, stages, embed, head)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(blocks))
    legal = [counts for counts in compositions(blocks, stages) if all(counts[1:-1])]
    assert quality([stop - start for start, stop in ranges]) == min(map(quality, legal))
    text = ",".join(("embed" if i == 0 else "head") if a == b else f"{a}-{b - 1}" for i, (a, b) in enumerate(ranges))
    assert parse_split(text, blocks, stages) == ranges


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-7", "has 1 parts for 2 virtual stages"),
        ("0-7,9-15", "block 8 is in no part"),
        ("0-8,8-15", "'8-15' does not go on from block 9"),
        ("0-7,8-14", "block 15 is in no part, the model has blocks 0-15"),
        ("0-7,8-16", "there is no block 16, the model has blocks 0-15"),
        ("0-7,8 to 15", "'8 to 15' is not a block"),
        ("head,0-15", "'head' is not a block"),
        ("0-7,8-", "'8-' is not a block"),
        ("0-15,16-15", "'16-15' does not go on"),
    ],
)
def test_wrong_splits_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_split(text, 16, 2)
