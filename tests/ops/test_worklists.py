"""Lists of work: cached as long as their intervals live unchanged; and what is made from the intervals alone."""

from __future__ import annotations

import gc
from threading import Thread

import pytest
import torch
from torch import Tensor

from flash_indexer.intervals import causal_intervals
from flash_indexer.ops import worklists
from flash_indexer.ops.kl.plan import GradientItems, TileChunk
from flash_indexer.ops.worklists import cached, deal, mean_weight, read


def intervals(length: int) -> tuple[Tensor, Tensor]:
    return causal_intervals(torch.tensor([0, length]))


def test_lists_are_cached_while_their_intervals_are_unchanged() -> None:
    made: list[tuple[Tensor, Tensor]] = []

    def make(start: Tensor, end: Tensor) -> list[int]:
        made.append((start, end))
        return end.tolist()

    start, end = intervals(70)
    first = cached(start, end, 70, "a", make)
    assert cached(start, end, 70, "a", make) is first and len(made) == 1
    assert cached(start, end, 70, "b", make) is not first and len(made) == 2
    assert made[0][0] is made[1][0], "the intervals are copied once for all lists"
    assert cached(start, end, 70, "a", make) is first and len(made) == 2
    end[10:20] = end[20]
    renewed = cached(start, end, 70, "a", make)
    assert renewed is not first and renewed[10] == 21 and len(made) == 3
    assert cached(start, end.clone(), 70, "a", make) is renewed and len(made) == 3, "the same contents"
    assert cached(start, end, 71, "a", make) is not renewed and len(made) == 4
    entries = len(worklists._cache)
    del start, made[:]
    gc.collect()
    assert len(worklists._cache) == entries - 1


def test_lists_of_recent_contents_are_kept_and_those_of_older_ones_let_go() -> None:
    made: list[int] = []

    def lists(length: int) -> object:
        return cached(*intervals(length), length, "a", lambda *_: made.append(length) or object())

    first = lists(80)
    assert lists(80) is first and lists(81) is not first and lists(80) is first and made == [80, 81]
    lists(82), lists(83)
    assert lists(80) is not first and made == [80, 81, 82, 83, 80]
    assert len(worklists._recent) == 2


def test_a_sample_of_queries_in_each_step_does_not_displace_all_queries() -> None:
    made: list[int] = []
    for step in range(4):
        for length in (180, 181 + step):
            cached(*intervals(length), length, "a", lambda *_, length=length: made.append(length))
    assert made == [180, 181, 182, 183, 184]


@pytest.mark.parametrize("processors", [3, 8])
def test_items_are_dealt_once_and_evenly(processors: int) -> None:
    cost = torch.randint(1, 9, (101,), generator=torch.Generator().manual_seed(0))
    items = torch.stack([torch.arange(101), torch.zeros(101), cost, torch.full((101,), 7)], 1).long()
    dealt = deal(items, cost, processors)
    assert dealt[:, 0][dealt[:, 3] == 7].sort().values.tolist() == list(range(101))
    assert (dealt[dealt[:, 3] != 7] == torch.tensor([0, 0, 0, -1])).all()
    place = {int(item[0]): n // processors for n, item in enumerate(dealt) if item[3] == 7}
    assert all(place[n] == n // processors for n in range(101)), "neighbours are under way together"
    load = torch.zeros(processors, dtype=torch.int64).index_add_(0, torch.arange(len(dealt)) % processors, dealt[:, 2])
    assert int(load.max() - load.min()) <= 8


def test_contents_are_checked_for_each_number_of_keys() -> None:
    start, end = intervals(70)
    assert cached(start, end, 70, "a", lambda *_: 1) == 1
    with pytest.raises(ValueError, match="key_end"):
        cached(start, end, 69, "a", lambda *_: 2)


def test_tensors_of_inference_mode_are_never_cached() -> None:
    with torch.inference_mode():
        start, end = intervals(5)
        made = [cached(start, end, 5, "a", lambda *_: object()) for _ in range(2)]
    assert made[0] is not made[1]


def test_what_is_kept_of_inference_mode_trains() -> None:
    start, end = intervals(90)
    same = intervals(91)
    cached(*same, 91, "a", lambda *_: 1)
    with torch.inference_mode():
        mean_weight(start, end, 90), mean_weight(*intervals(91), 91)
    assert not mean_weight(start, end, 90).is_inference(), "of the same tensors"
    assert not mean_weight(*same, 91).is_inference(), "of the same contents"


def test_threads_may_ask_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backwards of layers on two devices do: here another thread asks while this one compares contents."""
    several = [causal_intervals(torch.tensor([0, end, 90])) for end in (30, 40, 50, 60)]
    for n in range(2):
        cached(*several[n], 90, "a", lambda *_, made=n: made)
    equal, threads = torch.equal, [Thread(target=cached, args=(*several[2], 90, "a", lambda *_: 2))]

    def interrupted(a: Tensor, b: Tensor) -> bool:
        if threads:
            thread = threads.pop()
            thread.start()
            thread.join()
        return equal(a, b)

    monkeypatch.setattr(torch, "equal", interrupted)
    assert [cached(*several[n], 90, "a", lambda *_: 3) for n in (3, 2, 0)] == [3, 2, 0]
    assert not threads


def test_mean_weight() -> None:
    start, end = torch.tensor([0, 0, 2, 3], dtype=torch.int32), torch.tensor([1, 0, 4, 4], dtype=torch.int32)
    weight = mean_weight(start, end.clone().copy_(torch.tensor([1, 1, 2, 4])), 4)
    assert weight.dtype == torch.float32 and weight.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert mean_weight(start, start, 4).tolist() == [0.0] * 4


def test_lists_are_made_in_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threads = cached(*intervals(300), 300, "threads", lambda *_: torch.get_num_threads())
        assert threads == 1 and torch.get_num_threads() == 3
        with pytest.raises(ValueError, match="key_end"):
            cached(*intervals(301), 300, "threads", lambda *_: None)
        assert torch.get_num_threads() == 3

        def count() -> torch.Tensor:
            return torch.tensor(torch.get_num_threads())

        chunk = TileChunk(0, 1, 1, 1, count, count, lambda: GradientItems(count(), count(), count(), 0))
        assert (int(chunk.score), int(chunk.narrow), int(chunk.gradients.query)) == (1, 1, 1)
    finally:
        torch.set_num_threads(before)


def test_contents_read_ahead_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start, end = intervals(77)
    read(start, end, 77)
    monkeypatch.setattr(worklists, "_read", lambda *_: pytest.fail("reads wait for the device"))
    assert cached(start, end, 77, "a", lambda first, last: int((last - first).sum())) == int((end - start).sum())
