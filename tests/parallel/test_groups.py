"""Layouts, gathering, edge cases and refusals of both kinds of parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_indexer.parallel import context_positions
from flash_indexer.testing import Shape, make_inputs, reference_indexer_kl

BOTH = pytest.mark.parametrize("function", ["context", "tensor"])


def test_positions() -> None:
    assert [context_positions(12, 3, r).tolist() for r in range(3)] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert [context_positions(6, 3, r, layout="contiguous").tolist() for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert context_positions(5, 1, 0, layout="contiguous").dtype == torch.int64


def test_positions_refuse() -> None:
    with pytest.raises(ValueError, match="multiple of 8 .*zigzag on 4 ranks.*, got 13; pad to 16 .* zeros in"):
        context_positions(13, 4, 0)
    with pytest.raises(ValueError, match="length must be a multiple of 4 .*contiguous.*, got 13; pad to 16"):
        context_positions(13, 4, 0, layout="contiguous")
    with pytest.raises(ValueError, match="layout must be one of 'zigzag', 'contiguous', got 'ring'"):
        context_positions(16, 4, 0, layout="ring")
    with pytest.raises(ValueError, match="rank must be 0 to 3, got 4"):
        context_positions(16, 4, 4)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [2, 4])
def test_gathered_tokens_stand_in_global_order(ranks: Any, layout: str, world: int) -> None:
    expected = torch.arange(24 * 3).view(24, 3)
    for got in ranks.call("gather", world, which=str(world), layout=layout, length=24):
        assert type(got) is torch.Tensor and torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_gathered_rows_gradient_is_all_ranks_sum_at_its_owner(ranks: Any, layout: str, world: int) -> None:
    weights = sum(torch.arange(72.0).view(24, 3).double() + 100 * rank for rank in range(world))
    for whole, gradient, mine, x in ranks.call("gather_and_weigh", world, which=str(world), layout=layout, length=24):
        assert torch.equal(whole, x)
        torch.testing.assert_close(gradient, (weights * x.cos())[mine], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bucket", [1, 6, 1000])
def test_gradients_are_summed_in_buckets_and_those_of_one_rank_alone_too(pair: Any, bucket: int) -> None:
    for found in pair.call("sum_of_some_gradients", 2, bucket=bucket):
        assert found == [[12.0] * 2, [12.0] * 5, [16.0] * 3, None]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_a_sequence_that_does_not_divide_is_padded(ranks: Any, layout: str) -> None:
    shape = Shape(((1, 1), (30, 30)), H=3, G=1, D=8, I=2, E=32)
    parts = ranks.call("padded", 4, which="4", layout=layout, shape=shape, seed=1, length=32)
    order = torch.cat([context_positions(32, 4, rank, layout=layout) for rank in range(4)]).argsort()
    truth = reference_indexer_kl(make_inputs(shape, seed=1, dtype=torch.float64))
    torch.testing.assert_close(parts[0][0], truth.loss)
    for n, expected in enumerate(truth[1:], 1):
        got = torch.cat([part[n] for part in parts])[order]
        torch.testing.assert_close(got[:31], expected)
        assert not got[31:].any()


@BOTH
def test_nobody_sees_a_key(ranks: Any, function: str) -> None:
    for part in ranks.call("blind", 2, which="2", function=function):
        assert all((value == 0).all() for value in part)


@BOTH
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False,) * 3])
def test_only_wanted_gradients_are_given(ranks: Any, function: str, wanted: tuple[bool, ...]) -> None:
    everything = ranks.call("without_gradients", 2, which="2", function=function, wanted=(True,) * 3)
    for part, full in zip(
        ranks.call("without_gradients", 2, which="2", function=function, wanted=wanted), everything, strict=True
    ):
        assert torch.equal(part[0], full[0])
        for want, got, expected in zip(wanted, part[3:], full[3:], strict=True):
            assert torch.equal(got, expected) if want else got is None


@BOTH
def test_autocast_changes_nothing(ranks: Any, function: str) -> None:
    for plain, autocast in ranks.call("under_autocast", 2, which="2", function=function):
        assert all(torch.equal(a, b) for a, b in zip(plain, autocast, strict=True))


@BOTH
def test_a_second_backward_is_refused(ranks: Any, function: str) -> None:
    for told in ranks.call("again", 2, which="2", function=function):
        assert len(told) == 2
        assert f"{function}_parallel_indexer_kl: backward already ran" in told[0]
        assert f"{function}_parallel_indexer_kl: the loss has no second derivative" in told[1]


@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        ("context", dict(rows=7), "ValueError: context_parallel_indexer_kl: k must have a multiple of 2 rows on each"),
        ("context", dict(layout="ring"), "layout must be one of 'zigzag', 'contiguous', got 'ring'"),
        (
            "context",
            dict(which="no group"),
            "TypeError: context_parallel_indexer_kl: group must be a process group",
        ),
        ("context", dict(which="mesh", target="per_head"), 'target must be "mean" or "sum_logits" where heads are'),
        ("context", dict(workspace_bytes=0), "context_parallel_indexer_kl: workspace_bytes must be positive, got 0"),
        ("context", dict(lse=torch.zeros(3)), "context_parallel_indexer_kl: lse must be [T, H] = [8, 2], got [3]"),
        ("tensor", dict(which="mesh"), "ValueError: tensor_parallel_indexer_kl: group must be a process group or a"),
        ("tensor", dict(which=None), "tensor_parallel_indexer_kl: group must be a process group or a mesh of one"),
        ("tensor", dict(target="per_head"), 'tensor_parallel_indexer_kl: target must be "mean" or'),
        ("tensor", dict(workspace_bytes=-1), "tensor_parallel_indexer_kl: workspace_bytes must be positive, got -1"),
        ("tensor", dict(target="mode"), "tensor_parallel_indexer_kl: target must be one of"),
    ],
)
def test_bad_calls_are_refused_on_every_rank(ranks: Any, function: str, options: dict[str, Any], expected: str) -> None:
    for told in ranks.call("refused", 2, **(dict(which="2", function=function) | options)):
        assert expected in told


def test_a_group_of_others_is_refused(ranks: Any) -> None:
    told = ranks.call("refused", 4, which="2", function="tensor")
    assert told[:2] == ["nothing", "nothing"]
    assert all("group must hold this process" in message for message in told[2:])
