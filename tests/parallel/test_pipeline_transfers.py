"""Transfers of a pipeline on paper: each channel is first in, first out, and no program can hang."""

from collections import deque
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from olmo_fn.parallel.pipeline.schedule import Action
from olmo_fn.parallel.pipeline.transfers import AHEAD, SENDS, RankProgram, most_sends, rank_programs
from olmo_fn.planner.pipeline_simulate import Costs, simulate

CHUNKS = {"gpipe": (1, 2, 3, 4), "forward": (1, 2, 3, 4), "1f1b": (1,), "zero_bubble": (1,), "interleaved": (2, 3, 4)}
SIZES = [
    (kind, ranks, microbatches, chunks)
    for kind, several in CHUNKS.items()
    for chunks in several
    for ranks in range(1, 9)
    for microbatches in range(1, 20)
] + [(kind, 16, microbatches, several[-1]) for kind, several in CHUNKS.items() for microbatches in (1, 15, 16, 17, 31, 32, 47)]


programs_of = cache(rank_programs)


def edge(transfer):
    """The channel of a transfer."""
    return transfer.what, transfer.source, transfer.target


def between(programs, transfer_of):
    """Transfers between ranks by channel, in the order of the programs of the ranks that have this end."""
    found = {}
    for program in programs:
        for transfer in map(getattr(program, transfer_of), program.actions):
            if transfer and transfer.source != transfer.target:
                assert program.rank == {"outgoing": transfer.source, "incoming": transfer.target}[transfer_of]
                found.setdefault(edge(transfer), []).append(transfer)
    return found


def check(programs, channel=edge):
    """Ticks that the programs take on a network that is fast but holds nothing; ValueError if they could hang on it.

    A send ends when its receive is posted, and each rank's transfers on a channel are worked off in the order of posting: one
    ends when it is first at both ends. What a rank may do here it may also do later, so one order in which all end proves that
    all ends whatever the speeds are.
    """
    posted = {}  # transfers and when, by (rank, channel)
    ended, now = {}, [0.0] * len(programs)
    ranks = [_rank(program, posted, ended, now, channel) for program in programs]
    says, before = dict.fromkeys(range(len(ranks)), "the start"), None
    while says and (state := (len(ended), sum(map(len, posted.values())), *says.values())) != before:
        before = state
        says = {rank: at for rank in says if (at := next(ranks[rank], None))}
        for (rank, name), queue in posted.items():
            while queue and (transfer := queue[0][0]).source == rank:
                other = posted.get((transfer.target, name))
                if not other or other[0][0] != transfer:
                    break
                ended[transfer] = max(queue.popleft()[1], other.popleft()[1])
                for waiting in (queue, other):  # what comes after it cannot end before it
                    if waiting:
                        waiting[0] = waiting[0][0], max(waiting[0][1], ended[transfer])
    if says:
        raise ValueError(f"the pipeline's transfers hang: {'; '.join(f'rank {r} at {at}' for r, at in says.items())}")
    assert not any(posted.values())
    return max(now)


def _rank(program, posted, ended, now, channel):
    """What `execute` does, but for the data; yields what it waits for."""

    def post(transfer):
        posted.setdefault((program.rank, channel(transfer)), deque()).append((transfer, now[program.rank]))

    def wait(transfer, what):
        while transfer not in ended:
            yield what
        now[program.rank] = max(now[program.rank], ended[transfer])

    sending = deque()
    for i, action in enumerate(program.actions):
        for transfer in program.receives(i):
            post(transfer)
        wanted = program.incoming(action)
        if wanted and wanted.source != wanted.target:
            yield from wait(wanted, str(action))
        now[program.rank] += getattr(Costs, action.op)
        sent = program.outgoing(action)
        if sent and sent.source != sent.target:
            post(sent)
            sending.append(sent)
        if len(sending) > program.sends:
            yield from wait(sending.popleft(), "the end of a send")
    for transfer in sending:
        yield from wait(transfer, "the end of a send")


def test_channels_are_first_in_first_out():
    """What a rank produces for another comes in the order in which that one wants it, and all that is produced is wanted."""
    channels = 0
    for size in SIZES:
        programs = programs_of(*size)
        produced = between(programs, "outgoing")
        assert produced == between(programs, "incoming"), size
        assert all(len({*transfers}) == len(transfers) for transfers in produced.values())
        channels += len(produced)
    assert channels > 10_000


def test_receives_are_posted_once_and_in_time():
    for size in SIZES:
        for program in programs_of(*size):
            posted = [(i, t) for i in range(len(program.actions)) for t in program.receives(i)]
            wanted = [(i, t) for i, t in enumerate(map(program.incoming, program.actions)) if t and t.source != t.target]
            assert [t for _, t in posted] == [t for _, t in wanted]
            assert all(at == max(0, i - AHEAD) for (at, _), (i, _) in zip(posted, wanted, strict=True))


def test_nothing_hangs():
    for size in SIZES:
        check(programs_of(*size))


def test_nothing_is_held_up():
    """With few sends and receives under way a step takes no longer than with any number of them."""
    for size in SIZES[::9]:
        programs = programs_of(*size)
        assert check(programs) == simulate([program.actions for program in programs]).ticks


@pytest.mark.parametrize(
    "channel",
    [
        lambda t: (min(t.source, t.target), max(t.source, t.target)),  # a group of two, as NCCL makes for a pair of ranks
        lambda t: (t.what, min(t.source, t.target), max(t.source, t.target)),  # both directions of the ring in one group
        lambda t: (t.source, t.target),  # carries and cotangents in one group
        lambda t: t.what,  # a group of all ranks for each
    ],
)
def test_fewer_channels_could_hang(channel):
    def hangs(size):
        try:
            check(programs_of(*size), channel)
        except ValueError:
            return True
        return False

    assert any(hangs(size) for size in SIZES)


def test_fewer_sends_could_hang():
    """Rounds with more micro-batches than ranks need room; where ranks divide the micro-batches, `SENDS` are enough."""
    hung = []
    for kind, ranks, microbatches, chunks in SIZES:
        programs = [replace(program, sends=SENDS) for program in programs_of(kind, ranks, microbatches, chunks)]
        try:
            check(programs)
        except ValueError:
            hung.append((kind, most_sends(ranks, microbatches, chunks)))
    assert len(hung) > 30
    assert {kind for kind, _ in hung} == {"interleaved"}
    assert min(sends for _, sends in hung) > SENDS
    assert most_sends(8, 64, 4) == most_sends(8, 5, 4) == most_sends(8, 63, 1) == SENDS


def moved(program, i, j):
    """A program in which action ``i`` runs as number ``j``."""
    actions = list(program.actions)
    actions.insert(j, actions.pop(i))
    return replace(program, actions=tuple(actions))


@pytest.mark.parametrize(
    "mutant",
    [
        lambda first, last: (moved(first, 1, 0), last),  # micro-batches in another order than the other rank has them
        lambda first, last: (first, replace(last, actions=last.actions[:-1])),  # the other rank waits for one more
        lambda first, last: (moved(first, 4, 2), last),  # the backwards too
        lambda first, last: (first, replace(last, rank=0)),  # the program of another rank
    ],
)
def test_mutants_of_programs_are_caught(mutant):
    programs = rank_programs("1f1b", 2, 4)
    check(programs)
    with pytest.raises(ValueError, match="hang"):
        check(mutant(*programs))


def test_check_names_who_hangs():
    F, B = (lambda k: Action("F", 0, k)), (lambda k: Action("B", 0, k))
    blocked = RankProgram(0, 2, 1, (F(0), B(0), F(1), B(1))), RankProgram(1, 2, 1, (F(0), F(1), B(0), B(1)))
    with pytest.raises(ValueError, match=r"rank 0 at B\(chunk 0, microbatch 0\); rank 1 at F\(chunk 0, microbatch 1\)"):
        check(blocked)


def test_few_buffers():
    """Receives under way while an action runs: as many as actions ahead, not micro-batches, whatever comes back or does not."""
    for kind in ("gpipe", "forward", "1f1b", "zero_bubble"):
        for program in rank_programs(kind, 4, 32):
            waiting = 0
            for i, action in enumerate(program.actions):
                waiting += len(program.receives(i)) - bool(program.incoming(action))
                assert 0 <= waiting <= AHEAD


def test_all_ranks_agree_on_the_order():
    """Why channels are first in, first out: forwards in one order on all ranks, and backwards too."""
    for size in SIZES:
        for op in ("F", "B", "I", "W"):
            orders = [[a for a in program.actions if a.op == op] for program in programs_of(*size)]
            assert all(a == b for a, b in pairwise(orders))
