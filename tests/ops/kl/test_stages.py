"""The stages of head-sharded ranks, driven by hand: the torch body, and the GPU's with its kernels played by torch.

The players do what the kernels document, from the same work lists, in memory that held NaN: so that what a rank's lists
leave out, or take from another rank's piece, shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.kernels.sm_90.sizes import kl_parts
from flash_indexer.ops import Problem, Sums, launch, make_stages, run_stages
from flash_indexer.ops.bodies import TORCH
from flash_indexer.ops.kl import gpu_body, gpu_fused
from flash_indexer.ops.kl.plan_shards import cut_runs, largest_run, make_shard_plan
from flash_indexer.ops.kl.plan_sizes import PlanSizes
from flash_indexer.ops.worklists import TILE, visible_tiles
from flash_indexer.testing import Inputs, Result, Shape, make_inputs, reference_indexer_kl

HEADS = dict(H=4, G=2, D=8, I=3, E=32)
PADDED = 8  # index heads that kernels are built for, of 3
SHAPES = {
    "causal": Shape(((700, 700),), **HEADS),
    "packed": Shape(((1, 1), (300, 300), (129, 129), (1, 1), (150, 150)), **HEADS),
    "prefix": Shape(((5, 300), (200, 333), (1, 200)), **HEADS),
    "fewer_keys": Shape(((400, 130), (3, 0), (250, 20)), **HEADS),
    "blind_middle": Shape(((100, 100), (400, 20), (130, 130)), **HEADS),
    "window": Shape(((600, 600), (77, 77)), window=100, **HEADS),
    "latent": Shape(((300, 300),), **(HEADS | dict(G=1))),
    "short_end": Shape(((250, 250), (30, 30), (20, 20)), **HEADS),
    "one": Shape(((1, 1),), **HEADS),
    "nothing": Shape(((130, 0),), **HEADS),
}


@pytest.fixture
def players(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    """GpuStages on the CPU: torch in the kernels' place, and NaN in every tensor that torch.empty makes.

    What is launched on the side stream is done when the other one waits for it.
    """
    names = ("teacher_scores", "summed_logits", "teacher_lse", "index_scores", "kl_rows", "index_gradients")
    for name in names:
        monkeypatch.setattr(gpu_body, name, globals()[f"play_{name}"])
    monkeypatch.setattr(gpu_fused, "gradients", play_fused_gradients)
    streams = Streams()
    monkeypatch.setattr(launch, "side_stream", lambda device: streams.side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.here)
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    monkeypatch.setattr(gpu_body, "teacher_scores", streams.later(play_teacher_scores))
    monkeypatch.setattr(gpu_body, "prepare", lambda problem, fused: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield streams
    torch.use_deterministic_algorithms(False)


class Streams:
    """The current stream and the side stream, of which the first waits for the second and the other way around."""

    def __init__(self) -> None:
        self.side, self.here = (SimpleNamespace(wait_stream=wait) for wait in (self.fork, self.join))
        self.current, self.forked = self.here, False
        self.waiting: list[Any] = []
        self.beside = 0  # launches on the side stream

    def fork(self, other: Any) -> None:
        assert other is self.here and not self.waiting
        self.forked = True

    def join(self, other: Any) -> None:
        assert other is self.side
        while self.waiting:
            self.waiting.pop(0)()
        self.forked = False

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        yield
        self.current = before

    def later(self, play: Any) -> Any:
        def launched(*arguments: Any) -> None:
            if self.current is self.here:
                play(*arguments)
                return
            assert self.forked, "it would not wait for what it reads"
            made = {"narrow" if width in gpu_body.NARROW else "score" for width in (arguments[0].shape[2], HEADS["E"])}
            assert made <= vars(arguments[3]).keys(), "a list would be made while two streams are under way"
            self.beside += 1
            self.waiting.append(partial(play, *arguments))

        return launched


def rows_of(items: Tensor) -> list[list[int]]:
    return [[int(x) for x in row] for row in items.view(-1, 4)]


def play_score(q: Tensor, k: Tensor, chunk: Any, out: Tensor, value: Any) -> None:
    """out's tile = sum over heads of value(logits [rows, heads, keys], tokens); rows past the last are not written."""
    per_group = q.shape[1] // k.shape[1]
    for token, key, tile, _ in rows_of(chunk.score):
        here = slice(token, min(token + TILE, q.shape[0]))
        keys = k[key : key + TILE].repeat_interleave(per_group, 1)
        scores = value(torch.einsum("thd,shd->ths", q[here], keys), here).sum(1)
        out[tile * TILE :][: scores.shape[0], : scores.shape[1]] = scores


def play_teacher_scores(q, k, lse, chunk, out, scale, left=()) -> None:
    play_score(q, k, chunk, out, lambda x, here: (x * scale - lse[here, :, None]).exp())
    if left:
        key_start, key_end, sums = left
        for token, key, tile, _ in rows_of(chunk.score):
            seen, p = seen_of(key_start, key_end, token, key), out[tile * TILE :][:TILE]
            sums[tile * TILE :][: len(seen)] = torch.where(seen, p[: len(seen)], 0.0).sum(1)


def play_summed_logits(q, k, chunk, out, scale) -> None:
    play_score(q, k, chunk, out, lambda x, here: x * scale)


def play_index_scores(index_q, index_k, weights, chunk, out, left=()) -> None:
    play_score(index_q, index_k[:, None], chunk, out, lambda x, here: x.relu() * weights[here, :, None])
    if left:
        key_start, key_end, tops, masks = left
        queries = F.pad(index_q, (0, 0, 0, PADDED - index_q.shape[1], 0, TILE))
        for token, key, tile, _ in rows_of(chunk.score):
            seen, x = seen_of(key_start, key_end, token, key), out[tile * TILE :][:TILE]
            x = torch.where(seen, x[: len(seen)], -torch.inf)
            top = x.amax(1)
            total = (x - top.nan_to_num(neginf=0.0)[:, None]).exp().sum(1)
            tops[tile * TILE :][: len(seen)] = torch.stack([top, total], 1)
            keys = F.pad(index_k, (0, 0, 0, TILE))[key : key + TILE]
            positive = torch.einsum("tie,se->tis", queries[token : token + TILE], keys) > 0
            masks.view(-1, 8 * PADDED, masks.shape[1])[tile] = words(positive)


def seen_of(key_start: Tensor, key_end: Tensor, token: int, key: int) -> Tensor:
    """Which keys of a tile its tokens see; of a last block those that there are."""
    here, s = slice(token, token + TILE), key + torch.arange(TILE)
    return (s >= key_start[here, None]) & (s < key_end[here, None])


def words(positive: Tensor) -> Tensor:
    """Masks of a tile [128, PADDED, 128] in bits, as `device/mask_words.cuh` says: 16 rows (token, head) a line."""
    bits = positive.view(TILE * PADDED // 2, 2, 8, 2, 4, 2).long()  # of rows, and g / 2, g % 2, q, c of key 8g + 2q + c
    row, half, place = torch.arange(2)[:, None, None], torch.arange(8)[:, None], torch.arange(2)  # R % 2, g / 2, g % 2
    found = (bits << (16 * row + 8 * place + 7 - half)[..., None, None]).sum((1, 2, 3))  # R / 2, q, c
    return torch.where(found < 2**31, found, found - 2**32).int().view(-1, 64)


def play_teacher_lse(q, k, key_start, key_end, scale) -> Tensor:
    logits = scale * torch.einsum("thd,shd->ths", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    s = torch.arange(k.shape[0])
    seen = (s >= key_start[:, None]) & (s < key_end[:, None])
    return logits.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)


def play_kl_rows(p, scores, work, chunk, rows, out, logits) -> None:
    key_start, key_end, weight = rows
    di, kl, entropy = out
    assert p.shape == scores.shape == di.shape, "the kernel takes one number of rows for all three"
    for t in range(chunk.begin, chunk.end):
        base, first, end, _ = work.blocks.view(-1, 4)[t // TILE].tolist()
        at = torch.tensor([(base + n) * TILE + t % TILE for n in range(first, end)], dtype=torch.int64)
        low, high = int(key_start[t]) - first * TILE, int(key_end[t]) - first * TILE
        kl[t] = entropy[t] = 0.0
        di[at] = 0.0
        if high > low:
            share, score = p[at].flatten()[low:high], scores[at].flatten()[low:high]
            share = share.softmax(0) if logits else share / share.sum()
            kl[t] = (torch.xlogy(share, share) - share * score.log_softmax(0)).sum()
            entropy[t] = torch.special.entr(share).sum()
            values = torch.zeros((end - first) * TILE, dtype=di.dtype)
            values[low:high] = (score.softmax(0) - share) * weight[t]
            di[at] = values.view(-1, TILE)


def play_index_gradients(di, leaves, work, chunk, out, scores, parts=1) -> None:
    """Both kernels share masks, set where nothing is written, and w·index_q; rows past the last token are there too.

    parts: times 128 rows (token, head) of an item; w·index_q of 128 rows that hold no token is not written.
    """
    assert all(x.shape == di.shape for x in scores), "the masks' memory"
    for x in scores:
        x.fill_(torch.nan)  # it is overwritten
    index_q, index_k, weights = (F.pad(x, (0,) * 2 * (x.dim() - 1) + (0, TILE)) for x in leaves)
    (T, I, E), tokens = leaves[0].shape, TILE // PADDED  # of 128 rows
    tiles = di.view(-1, TILE, TILE)
    masks = torch.ones(len(tiles), TILE, I, TILE, dtype=torch.bool)
    scaled = (torch.empty if work.complete else torch.zeros)(len(index_q), I, E, dtype=di.dtype)
    items = [
        (token + part * tokens, *item)
        for (token, *item), part in itertools.product(rows_of(chunk.gradients.query), range(parts))
    ]
    for token, first, count, base in items:
        if token >= T:
            continue
        rows, here = slice(token % TILE, token % TILE + tokens), slice(token, token + tokens)
        unscaled = torch.zeros(tokens, I, E, dtype=di.dtype)
        for n in range(first, first + count):
            keys = index_k[n * TILE : n * TILE + TILE]
            masks[base + n, rows] = torch.einsum("tie,se->tis", index_q[here], keys) > 0
            unscaled += masked(masks[base + n, rows], tiles[base + n, rows]) @ keys
        scaled[here] = weights[here, :, None] * index_q[here]
        written = slice(token, min(token + tokens, T))
        unscaled = unscaled[: written.stop - token]
        out.weights[written] = (index_q[written] * unscaled).sum(-1)
        out.index_q[written] = unscaled * weights[written, :, None]
    if out.index_k is not None:
        partials = out.index_k.new_empty(chunk.gradients.slots * TILE, E)
        for pair, begin, end, slot in rows_of(chunk.gradients.key):
            read_end = min(end * TILE // 4, -(-T // tokens) * tokens)  # in tiles of 128 rows (token, head)
            if begin * TILE // 4 >= read_end:
                continue
            for v, key_tile in enumerate((2 * pair, 2 * pair + 1)):
                total = torch.zeros(TILE, E, dtype=di.dtype)
                for token in range(begin * TILE // 4, read_end, tokens):
                    base, first, last, _ = work.blocks.view(-1, 4)[token // TILE].tolist()
                    if first <= key_tile < last:
                        tile, rows = base + key_tile, slice(token % TILE, token % TILE + tokens)
                        m = masked(masks[tile, rows], tiles[tile, rows])
                        total += torch.einsum("tis,tie->se", m, scaled[token : token + tokens])
                rows = out.index_k[key_tile * TILE :][:TILE]
                if slot >= 0:
                    place = slot + v * (chunk.gradients.slots // 2)
                    partials[place * TILE : (place + 1) * TILE] = total
                elif chunk.adds:
                    rows += total[: rows.shape[0]]
                else:
                    rows.copy_(total[: rows.shape[0]])
        for key_tile, begin, end, _ in rows_of(chunk.gradients.reduce):
            rows = out.index_k[key_tile * TILE :][:TILE]
            for slot in range(begin, end):
                rows += partials[slot * TILE : (slot + 1) * TILE][: rows.shape[0]]


def play_fused_gradients(scores, left, leaves, work, chunk, rows, out) -> None:
    """As the two others, but that di of tokens in no item is not written, and of what the scores left all is read."""
    p, x = scores
    assert p.shape == x.shape == out.di.shape and len(left.sums) == len(left.tops) == len(p)
    for t in range(chunk.begin, chunk.end):
        base, first, end, _ = work.blocks.view(-1, 4)[t // TILE].tolist()
        at = torch.tensor([(base + n) * TILE + t % TILE for n in range(first, end)], dtype=torch.int64)
        low, high = (int(y[t]) - first * TILE for y in rows[:2])
        if high > low:
            torch.testing.assert_close(left.sums[at].sum(), p[at].flatten()[low:high].sum())
            tops = left.tops[at]
            torch.testing.assert_close(
                (tops[:, 0] + tops[:, 1].log()).logsumexp(0), x[at].flatten()[low:high].logsumexp(0)
            )
    written = out.di.new_zeros(out.di.shape, dtype=torch.bool).view(-1, TILE, TILE)
    queries = F.pad(leaves[0], (0, 0, 0, PADDED - leaves[0].shape[1], 0, TILE))
    keys = F.pad(leaves[1], (0, 0, 0, TILE))
    lines, parts = left.masks.view(-1, 8 * PADDED, left.masks.shape[1]), kl_parts(leaves[0].shape[2])
    for token, key_tile, count, base in rows_of(chunk.gradients.query):
        block, line = token // TILE * TILE, token % TILE // 2
        for n in range(key_tile, key_tile + count):
            positive = torch.einsum("tie,se->tis", queries[block : block + TILE], keys[n * TILE : n * TILE + TILE]) > 0
            here = slice(line, line + 8 * parts)
            assert torch.equal(lines[base + n, here], words(positive)[here])
        _, first, end, _ = work.blocks.view(-1, 4)[token // TILE].tolist()
        written[base + first : base + end, token % TILE : token % TILE + parts * TILE // PADDED] = True
    if not work.complete:
        out.di.zero_()
    before = out.di.clone()
    play_kl_rows(p, x, work, chunk, rows, (out.di, out.kl, out.entropy), False)
    out.di.copy_(torch.where(written.view(-1, TILE), out.di, before))
    play_index_gradients(out.di, leaves, work, chunk, out.gradients, scores, parts)


def masked(mask: Tensor, di: Tensor) -> Tensor:
    """di[t, s] where the mask [t, j, s] is set: of NaN without it nothing is left, as of a bitwise AND."""
    return torch.where(mask, di[:, None], 0.0)


def drive(
    x: Inputs, world: int, body: str, needs: tuple[bool, ...] = (True,) * 3, lse: bool = True, **options: Any
) -> list[Sums]:
    """`run_stages` for several ranks, all of them in turn: a chunk ahead, sums over ranks cut into pieces."""
    H, G = x.q.shape[1:2] + x.k.shape[1:2]
    settings = dict(target="mean", workspace=2**29) | options
    ranks, asked = [], []
    for rank in range(world):
        heads = slice(H * rank // world, H * (rank + 1) // world)
        groups = slice(heads.start * G // H, -(-heads.stop * G // H))
        problem = Problem(
            x.q[:, heads], x.k[:, groups], x.index_q, x.index_k, x.index_weights, x.lse[:, heads] if lse else None,
            x.key_start, x.key_end, x.token_weight, x.softmax_scale, settings["target"], settings["workspace"], needs,
        )  # fmt: skip
        ranks.append(make_stages(problem, body, rank, world, asked.append))
    if world == 1:
        return [run_stages(ranks[0], x.q.device)]
    following: list[Tensor] = []
    for n in range(ranks[0].chunks + 1):
        under_way = following
        if n < ranks[0].chunks:
            following = [stages.teacher(n) for stages in ranks]
            assert asked[-1] >= int(x.key_end[ranks[0].rows(n)[-1][1] - 1])
        if n > 0:
            pieces = torch.stack(under_way).sum(0).chunk(world)
            for stages, piece in zip(ranks, pieces, strict=True):
                stages.index(n - 1, piece)
    return [stages.sums for stages in ranks]


def whole(parts: list[Sums]) -> list[Tensor]:
    return [torch.stack(values).sum(0) for values in zip(*parts, strict=True)]


@pytest.fixture(params=[TORCH, "sm_90"])
def body(request: pytest.FixtureRequest) -> str:
    if request.param != TORCH:
        request.getfixturevalue("players")
    return str(request.param)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world", [1, 4])
def test_the_ranks_together_are_one(body: str, name: str, world: int) -> None:
    heads = dict(G=4) if SHAPES[name].G == 2 and world == 4 else {}
    x = make_inputs(replace(SHAPES[name], **heads), seed=8, dtype=torch.float64)
    workspace = 2**29 if name == "causal" else 2**16 if body == TORCH else 1  # torch's chunks need no 128 rows
    got = whole(drive(x, world, body, workspace=workspace))
    truth = reference_indexer_kl(x, token_weight=x.token_weight)
    for field, value, expected in zip(Result._fields[1:], got, truth[1:], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.parametrize(
    ("world", "target", "beside"),
    [(1, "mean", True), (1, "sum_logits", False), (2, "mean", False)],
)
def test_one_process_forms_the_teachers_scores_beside_the_indexers(
    world: int, target: str, beside: bool, players: Streams
) -> None:
    x = make_inputs(SHAPES["causal"], seed=5, dtype=torch.float64)
    drive(x, world, "sm_90", target=target, workspace=2**20)
    assert players.beside > 1 if beside else players.beside == 0


@pytest.mark.parametrize("needs", [(True,) * 3, (False, True, False), (True, False, False)])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("players")
def test_scores_leave_what_the_gradients_take(
    name: str, needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that are narrow enough, one process and one chunk, and one of each block of tokens."""
    for unused in ("kl_rows", "index_gradients"):
        monkeypatch.delattr(gpu_body, unused)
    monkeypatch.setattr(gpu_body, "row_kernel", lambda work: "rows_warp")
    x = make_inputs(replace(SHAPES[name], D=64), seed=8, dtype=torch.float64)
    truth = reference_indexer_kl(x, token_weight=x.token_weight)
    for workspace in (2**29, 1):
        (got,) = drive(x, 1, "sm_90", needs, workspace=workspace)
        for value, expected in zip(got, truth[1:], strict=True):
            if value is not None:
                torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("players")
def test_few_long_rows_have_kernels_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gpu_fused, "gradients")
    x = make_inputs(Shape(((5, 700),), **(HEADS | dict(D=64))), seed=8, dtype=torch.float64)
    (got,) = drive(x, 1, "sm_90")
    truth = reference_indexer_kl(x, token_weight=x.token_weight)
    for value, expected in zip(got, truth[1:], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("processors", [4, 132])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("players")
def test_the_keys_gradient_in_quarters_of_blocks(name: str, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiprocessor each, as a workspace for all tiles has them, where the last quarters hold no token."""
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    x = make_inputs(SHAPES[name], seed=8, dtype=torch.float64)
    (got,) = drive(x, 1, "sm_90")
    truth = reference_indexer_kl(x, token_weight=x.token_weight)
    for value, expected in zip(got, truth[1:], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("target", ["mean", "sum_logits"])
def test_targets(body: str, target: str, lse: bool) -> None:
    x = make_inputs(SHAPES["packed"], seed=8, dtype=torch.float64)
    got = whole(drive(x, 2, body, target=target, lse=lse and target == "mean"))
    truth = reference_indexer_kl(x, target=target, token_weight=x.token_weight)
    for value, expected in zip(got, truth[1:], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_gradients_that_are_not_wanted_are_not_made(body: str, needs: tuple[bool, ...]) -> None:
    x = make_inputs(SHAPES["packed"], seed=8, dtype=torch.float64)
    truth = reference_indexer_kl(x, token_weight=x.token_weight)
    parts = drive(x, 2, body, needs)
    for n, need in enumerate(needs):
        assert all((part[2 + n] is not None) == need for part in parts)
        if need:
            torch.testing.assert_close(sum(part[2 + n] for part in parts), truth[3 + n], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(part.kl for part in parts), truth.kl, rtol=1e-10, atol=1e-12)


def test_each_rank_works_on_rows_of_its_own(body: str) -> None:
    parts = drive(make_inputs(SHAPES["causal"], seed=8, dtype=torch.float64), 4, body, workspace=2**20)
    worked = torch.stack([part.kl != 0 for part in parts]).sum(0)
    assert worked.max() == 1
    assert all((part.kl != 0).any() for part in parts)


def causal_plan(blocks: int, world: int, workspace: int) -> tuple[list[int], list[tuple[int, ...]]]:
    T = blocks * TILE
    starts, ends = torch.zeros(T, dtype=torch.int64), torch.arange(1, T + 1)
    first, end = visible_tiles(starts, ends, TILE)
    counts = (end - first).tolist()
    return counts, cut_runs(counts, PlanSizes(T, 128, 64, False, workspace, 132), world)


@pytest.mark.parametrize("world", [2, 8])
def test_work_is_cut_evenly_and_within_the_workspace(world: int) -> None:
    """64K tokens: the ranks' pieces of a chunk differ little, so that few tiles are padding."""
    workspace = 2**29
    counts, runs = causal_plan(512, world, workspace)
    assert [b for bounds in runs for b in bounds[:-1]][::world] == [bounds[0] for bounds in runs]
    assert runs[0][0] == 0 and runs[-1][-1] == 512
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(runs))
    bytes_per_tile = TILE * TILE * (8 + 14 / world)
    padded = 0
    for bounds in runs:
        tiles = world * largest_run(counts, bounds)
        padded += tiles
        assert tiles * bytes_per_tile <= workspace or bounds[-1] - bounds[0] <= world
    assert padded <= 1.03 * sum(counts)
    load = [sum(sum(counts[b[r] : b[r + 1]]) for b in runs) for r in range(world)]
    assert max(load) <= 1.05 * min(load)


def test_all_ranks_cut_alike() -> None:
    starts, ends = (y.long() for y in SHAPES["packed"].intervals())
    sizes = PlanSizes(SHAPES["packed"].S, 32, 8, True, 2**21, 132)
    plans = [make_shard_plan(starts, ends, sizes, rank, 4, torch.device("cpu")) for rank in range(4)]
    for plan in plans[1:]:
        for mine, first in zip(plan.shards, plans[0].shards, strict=True):
            assert mine.rows == first.rows and mine.piece == first.piece
            assert torch.equal(mine.teacher.score, first.teacher.score)
