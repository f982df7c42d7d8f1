"""Reading ahead."""

import threading
import time
import traceback

import pytest

from olmo_fn.data.prefetch import prefetch


def alive():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetch_is_the_sequence():
    assert list(prefetch(lambda step: step, 3, 50, depth=4)) == list(range(3, 50))
    assert list(prefetch(lambda step: step, 3, 3)) == []
    assert not alive()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_reads_depth_ahead_and_no_more(depth):
    asked = []
    batches = prefetch(lambda step: asked.append(step) or step, 0, 100, depth)
    next(batches)
    time.sleep(0.1)
    assert len(asked) == depth + 1
    batches.close()
    assert not alive()


def test_the_consumer_does_not_wait():
    def slow(step):
        time.sleep(0.01)
        return step

    waits = []
    batches = prefetch(slow, 0, 12)
    next(batches)
    for _ in range(11):
        time.sleep(0.03)
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    assert sorted(waits)[len(waits) // 2] < 0.002


def test_an_error_comes_after_the_batches_before_it_with_its_traceback():
    def data(step):
        if step == 3:
            raise KeyError("the data's own error")
        return step

    batches = prefetch(data, 0, 10)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="own error") as e:
        next(batches)
    assert "data" in [frame.name for frame in traceback.extract_tb(e.value.__traceback__)]
    assert not alive()


def test_a_loop_that_breaks_ends_the_thread():
    def loop():
        for step in prefetch(lambda step: step, 0, 10**9):
            if step == 5:
                break

    loop()
    assert not alive()
