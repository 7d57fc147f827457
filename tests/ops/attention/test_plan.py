"""Work lists of the attention kernels: every visible pair once, masks exactly where they are needed."""

from __future__ import annotations

import pytest
import torch

from flash_indexer.intervals import causal_intervals
from flash_indexer.ops.attention.plan import (
    Tiles,
    attention_items,
    gradient_items,
    key_items,
    latent_rows,
    part_counts,
    row_items,
)


def packed(*lengths):
    return causal_intervals(torch.tensor([0, *lengths]).cumsum(0))


def windowed(length, window):
    end = torch.arange(1, length + 1, dtype=torch.int32)
    return (end - window).clamp(min=0), end


def arbitrary(seed, T, S):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, S + 1, (T,), generator=generator).sort().values
    end = torch.maximum(start, torch.randint(0, S + 1, (T,), generator=generator).sort().values).cummax(0).values
    return start.int(), end.int()


LAYOUTS = {
    "packed": (*packed(300, 1, 211), 512),
    "short": (*packed(1, 2, 1, 5), 9),
    "window": (*windowed(700, 130), 700),
    "whole tiles": (*packed(256, 384), 640),
    "arbitrary": (*arbitrary(0, 333, 500), 500),
    "empty rows": (*arbitrary(1, 40, 7), 7),
    "nothing": (torch.zeros(9, dtype=torch.int32), torch.zeros(9, dtype=torch.int32), 4),
}
EACH = pytest.mark.parametrize("layout", LAYOUTS)
TOKENS = pytest.mark.parametrize("tokens", [1, 2, 42, 128])


def visible(start, end, num_keys):
    s = torch.arange(num_keys)
    return (s >= start[:, None]) & (s < end[:, None])


@EACH
@TOKENS
@pytest.mark.parametrize("keys", [48, 128])
def test_row_items_visit_what_is_seen(layout, tokens, keys):
    start, end, num_keys = LAYOUTS[layout]
    items = row_items(start, end, Tiles(3, tokens, keys, 7)).tolist()
    T, seen = start.shape[0], visible(start, end, num_keys)
    assert sorted((t, g) for t, g, *_ in items) == [(t, g) for t in range(0, T, tokens) for g in range(3)]
    for t0, _, first, tiles, right, left, *_ in items:
        assert 1 <= right <= left <= tiles
        rows = slice(t0, min(t0 + tokens, T))
        low, high = first - (tiles - 1) * keys, first + keys
        outside = torch.ones(num_keys, dtype=torch.bool)
        outside[max(low, 0) : high] = False
        assert not seen[rows][:, outside].any()
        for j in range(right, left):  # unmasked: every row sees every key, and has seen its last key before
            begin = first - j * keys
            assert begin >= 0 and seen[rows, begin : begin + keys].all()
        last = end[rows][seen[rows].any(1)] - 1
        assert ((first + keys - 1 - last) // keys < right).all()


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_causal_documents_are_masked_at_the_diagonal_alone(tokens):
    start, end = packed(2048, 1024)
    items = row_items(start, end, Tiles(1, tokens, 96, 5))
    count, right, left = items[:, 3], items[:, 4], items[:, 5]
    assert (left == count).all() and (right <= 2).all() and (right == 1).float().mean() > 0.8


@EACH
@TOKENS
@pytest.mark.parametrize("max_slots", [0, 3, 10_000])
def test_key_items_visit_what_is_seen(layout, tokens, max_slots):
    start, end, num_keys = LAYOUTS[layout]
    items, reduce, slots = key_items(start, end, num_keys, tokens, max_slots, 5)
    T, seen = start.shape[0], visible(start, end, num_keys)
    assert slots <= max_slots
    count = torch.zeros(T, num_keys, dtype=torch.int64)
    used = []
    for kt, first, last, whole, stop, slot, *_ in items.tolist():
        assert first <= whole <= stop <= last and first < last
        keys = slice(kt * 128, min(kt * 128 + 128, num_keys))
        count[first * tokens : last * tokens, keys] += 1
        assert seen[whole * tokens : stop * tokens, keys].all()
        used.append((slot, kt))
    assert (count[seen] == 1).all() and (count <= 1).all()
    assert sorted(slot for slot, _ in used if slot >= 0) == list(range(slots))
    owners = {slot: kt for slot, kt in used}
    assert all(owners[slot] == kt for kt, a, b, _ in reduce.tolist() for slot in range(a, b))
    assert sum(b - a for _, a, b, _ in reduce.tolist()) == slots
    firsts = [kt for slot, kt in used if slot < 0]
    assert len(firsts) == len(set(firsts)) == len({kt for _, kt in used})


@EACH
@pytest.mark.parametrize("heads", [1, 24, 128])
def test_latent_rows_visit_what_is_seen(layout, heads):
    start, end, num_keys = LAYOUTS[layout]
    rows, seen = start.shape[0] * heads, visible(start, end, num_keys)
    items = latent_rows(start, end, heads, 7).tolist()
    assert sorted(row for row, *_ in items) == list(range(0, rows, 64))
    for row, first, pairs, low, high, *_ in items:
        tokens = slice(row // heads, (min(row + 64, rows) - 1) // heads + 1)
        assert pairs >= 1
        outside = torch.ones(num_keys, dtype=torch.bool)
        outside[max(first + 64 - 128 * pairs, 0) : max(first + 64, 0)] = False
        assert not seen[tokens][:, outside].any()
        assert seen[tokens, low : max(low, high)].all()


def test_the_longest_come_first_and_rounds_alternate():
    start, end = packed(500)
    length = row_items(start, end, Tiles(1, 2, 64, 10))[:, 3].tolist()
    loads = [sum(length[cta::10]) for cta in range(10)]
    assert max(loads) - min(loads) <= max(length)


def test_lists_are_kept_while_the_intervals_live_unchanged():
    start, end = packed(100, 50)
    tiles = Tiles(1, 2, 128, 4)
    first = attention_items(start, end, 150, tiles)
    assert attention_items(start, end, 150, tiles) is first
    assert gradient_items(start, end, 150, tiles, 2, 8) is gradient_items(start, end, 150, tiles, 2, 8)
    end[-1] -= 1
    assert attention_items(start, end, 150, tiles) is not first


def test_contents_are_checked():
    start, end = packed(10)
    with pytest.raises(ValueError, match="key_end"):
        attention_items(start, end, 9, Tiles(1, 2, 128, 4))


@EACH
@TOKENS
def test_no_row_sees_more_of_the_first_tile_than_it_says(layout, tokens):
    """And where the last row sees anything, it sees its last key there: what is visited beyond is in vain."""
    start, end, num_keys = LAYOUTS[layout]
    seen = visible(start, end, num_keys)
    for token, _, first, _, _, _, count, _ in row_items(start, end, Tiles(1, tokens, 96, 4)).tolist():
        keys = seen[token : token + tokens].any(0).nonzero().flatten()
        last = min(token + tokens, start.shape[0]) - 1
        if keys.numel():
            assert int(keys[-1]) + 1 <= first + count <= first + 96
        if seen[last].any():
            assert first + count == end[last]


def test_parts_end_together_and_keep_to_their_slots():
    runs = torch.arange(40, 1080, 16)
    for limit in (10, 200, 2000):
        parts = part_counts(runs, limit, 132)
        assert (parts >= 1).all() and int((parts - 1).sum()) <= limit
    items, _, slots = key_items(*packed(2035, 2037, 2031, 2040), 8143, 2, 2048, 132)
    load = torch.zeros(132).index_add_(0, torch.arange(items.shape[0]) % 132, (items[:, 2] - items[:, 1]).float() + 1.5)
    assert load.max() <= 1.03 * load.mean() and slots < 1000


def test_the_last_rounds_even_out_what_the_first_left():
    items = row_items(*packed(2035, 2037, 2031, 2040), Tiles(1, 2, 128, 132))
    load = torch.zeros(132).index_add_(0, torch.arange(items.shape[0]) % 132, items[:, 3].float() + 1)
    assert load.max() <= 1.01 * load.mean()
