"""Which tiles the attention kernels are launched with: those given, or those chosen for the GPU by its name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flash_indexer.kernels import tuned
from flash_indexer.kernels.sm_90 import sizes as tiles
from flash_indexer.ops.attention import per_head_op
from flash_indexer.ops.attention.gpu_gradients import kernels as kernels_of
from flash_indexer.ops.attention.layout import tile_sizes
from flash_indexer.ops.problem import Problem

SHAPE = dict(D=128, E=64, HG=64)
WINNER = {"N": 96, "XS": 1, "Y2S": 3}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU by name, on which the gradient of index_q has a winner."""

    def sizes(kernel, name, shape):
        assert name == "NVIDIA H100 80GB HBM3"
        return WINNER if kernel == "head_gradients_query" else tiles.default(kernel, shape)

    monkeypatch.setattr(tuned, "sizes", sizes)
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_given_sizes_come_before_those_of_the_gpu(gpu):
    chosen = [tile_sizes(kernel, SHAPE, torch.device("cuda")) for kernel in tiles.KERNELS[1:]]
    assert chosen == [WINNER, tiles.head_gradients_key(128, 64)]
    given = {"head_gradients_query": {"N": 64}}
    assert tile_sizes("head_gradients_query", SHAPE, torch.device("cuda"), given) == {"N": 64}
    assert tile_sizes("head_gradients_key", SHAPE, torch.device("cuda"), given) == chosen[1]


def wanted(V, E=64, needs=(True, True, True), deterministic=True):
    """Kernels by name with their sizes, of a call with 64 heads on one key head, 100 wide."""
    q, k, index_q, none = torch.empty(5, 64, 100), torch.empty(5, 1, 100), torch.empty(5, 64, E), torch.empty(0)
    problem = Problem(q, k, index_q, none, none, None, none, none, None, 1.0, "per_head", 0, needs)
    named = kernels_of(problem, V, deterministic)
    assert len({name for name, _ in named}) == len(named)
    return dict(named)


def test_what_is_prepared_is_what_is_launched(gpu):
    assert wanted(128) == {
        "attention": dict(D=128, V=128, E=64, HG=64, **tiles.attention(128, 128, 64, 64)),
        "head_gradients_query": SHAPE | WINNER,
        "head_gradients_key": SHAPE | tiles.head_gradients_key(128, 64),
        "gradients_reduce": {"E": 64},
    }


@pytest.mark.parametrize(
    "needs, gradients",
    [
        ((True, True, True), {"head_gradients_query", "head_gradients_key", "gradients_reduce", "scale"}),
        ((False, False, True), {"head_gradients_query", "scale"}),
        ((False, True, False), {"head_gradients_key", "gradients_reduce", "scale"}),
        ((False, False, False), set()),
    ],
)
def test_no_kernel_is_prepared_for_a_gradient_that_is_not_wanted(gpu, needs, gradients):
    prepared = wanted(0, needs=needs)
    assert prepared.pop("attention") == dict(D=128, V=0, E=64, HG=64, **tiles.attention(128, 0, 64, 64))
    assert prepared.keys() == gradients


@pytest.mark.parametrize(
    "needs, E, once",
    [
        ((True, True, True), 64, True),
        ((False, True, True), 64, True),
        ((True, True, False), 64, True),
        ((True, True, True), 128, False),
        ((True, False, True), 64, False),
        ((False, True, False), 64, False),
    ],
)
def test_one_kernel_makes_all_gradients_where_their_bits_may_differ(gpu, needs, E, once):
    prepared = wanted(128, E, needs, deterministic=False)
    names = {name for name in prepared if name.startswith(("head_gradients", "gradients"))}
    assert (names == {"head_gradients_once"}) == once
    assert not once or prepared["head_gradients_once"] == SHAPE
    assert once or "head_gradients_once" not in names
    torch.use_deterministic_algorithms(True)
    try:
        prepared = wanted(128, E, needs, deterministic=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "head_gradients_once" not in prepared and prepared


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_operator_rounds_the_sum_and_says_how_it_may_be_made(monkeypatch, deterministic):
    index = torch.ones(3, 2, 64).bfloat16(), torch.ones(5, 64).bfloat16(), torch.ones(3, 2)
    asked = []

    def played(problem, lse_index, *, deterministic):
        asked.append((tuple(problem.needs), deterministic))
        return None, torch.full((5, 64), 1 + 2**-10), torch.full((3, 2), 2.0)

    monkeypatch.setattr(per_head_op, "per_head_gradients", played)
    rows, ends = torch.zeros(3, 2), torch.ones(3, dtype=torch.int32)
    gradients = torch.ops.flash_indexer.per_head_gradients.default(
        rows, rows, *index, rows, rows, rows[:, 0], ends, ends, 1.0, [False, True, True], deterministic
    )
    assert asked == [((False, True, True), deterministic)]
    assert gradients[0].numel() == 0 and gradients[1].dtype == torch.bfloat16 and gradients[2].dtype == torch.float32
    assert (gradients[1] == 1).all() and (gradients[2] == 2).all()
