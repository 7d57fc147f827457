"""Peak memory of forward plus backward on the GPU: the workspace and a quarter of the tensors."""

from __future__ import annotations

import pytest
import torch

from flash_indexer.bench import sparse_memory
from flash_indexer.bench.sparse_problem import SparseSize, make
from flash_indexer.ops import Needs, sparse_backward, sparse_forward
from flash_indexer.testing import Inputs, Shape, random_inputs

pytestmark = pytest.mark.gpu
WORKSPACE = 64 * 2**20
PARTIAL_SUMS = 64 * 2**20  # of d_index_k, at most


@pytest.mark.parametrize("tokens", [4096, 16384])
@pytest.mark.parametrize("window", [None, 512])
def test_peak_memory(tokens, window, measure):
    shape = Shape(((1500, 1500),), H=9, G=3, D=64, I=8, E=64, window=window)
    x = random_inputs(shape, *shape.intervals(), generator=torch.Generator("cuda").manual_seed(0), dtype=torch.bfloat16)
    copies = -(-tokens // shape.T)
    tensors = {
        name: getattr(x, name).repeat(copies, *[1] * (getattr(x, name).ndim - 1))[:tokens]
        for name in ("q", "k", "index_q", "index_k", "index_weights", "lse", "token_weight")
    }
    whole = Shape(((tokens, tokens),), H=9, G=3, D=64, I=8, E=64, window=window)
    key_start, key_end = (y.cuda() for y in whole.intervals())
    x = type(x)(**tensors, key_start=key_start, key_end=key_end, softmax_scale=x.softmax_scale)
    measure(x, workspace_bytes=WORKSPACE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = measure(x, workspace_bytes=WORKSPACE)
    leaves = sum(y.nbytes for y in (x.index_q, x.index_k, x.index_weights))  # `measure` copies them
    extra = torch.cuda.max_memory_allocated() - before - leaves
    tensors_bytes = sum(y.nbytes for y in tensors.values()) + sum(y.nbytes for y in result)
    outputs = sum(y.nbytes for y in result)
    print(f"{extra / 2**20:.1f} MiB beside the inputs, {outputs / 2**20:.1f} MiB of them outputs")
    assert extra - outputs <= WORKSPACE + tensors_bytes / 4


@pytest.mark.parametrize("tokens", [4096, 16384])
def test_per_head_needs_a_quarter_of_the_tensors_and_its_partial_sums(tokens, measure):
    shape = Shape(((tokens, tokens),), H=8, G=2, D=128, I=8, E=64, window=512)
    generator = torch.Generator("cuda").manual_seed(0)
    q, index_q = (torch.randn(tokens, 8, n, device="cuda", generator=generator).bfloat16() for n in (128, 64))
    k, index_k = q[:, :2].contiguous(), index_q[:, 0].contiguous()
    weights = torch.randn(tokens, 8, device="cuda", generator=generator)
    key_start, key_end = (y.cuda() for y in shape.intervals())
    x = Inputs(q, k, index_q, index_k, weights, key_start, key_end, weights, weights[:, 0], 128**-0.5)
    measure(x, target="per_head")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = measure(x, target="per_head")
    copies = index_q.nbytes + index_k.nbytes + weights.nbytes
    extra = torch.cuda.max_memory_allocated() - before - copies - sum(y.nbytes for y in result)
    print(f"{extra / 2**20:.1f} MiB beside inputs and outputs")
    tensors = sum(y.nbytes for y in (q, k, index_q, index_k, weights))
    assert extra <= PARTIAL_SUMS + 4 * index_k.numel() + tensors / 4


@pytest.mark.parametrize("heads", [(9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("keys", [16384, 131072])
def test_bits_of_selected_keys_live_in_the_workspace(keys, heads):
    H, G, D = heads
    size = SparseSize(H, G, D, D, 8, 64, 2048, keys, 512)
    x = make(size)
    problem, needs = x.problem(size, workspace_bytes=WORKSPACE), Needs(True, True, True, True)

    def run():
        out, lse = sparse_forward(problem)
        return out, lse, *sparse_backward(problem, x.d_out, out, lse, needs)

    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    extra = torch.cuda.max_memory_allocated() - before - sum(y.nbytes for y in results)
    print(f"{extra / 2**20:.1f} MiB beside inputs and outputs")
    copies = x.k.nbytes + x.v.nbytes
    assert extra <= 2 * WORKSPACE + copies + sum(y.nbytes for y in x[:4]) / 4


def test_a_layer_of_v32_at_128k_fits_60_gb():
    """Queries, absorbed a run at a time, forward and backward; its output and gradient are checked in float64."""
    assert sparse_memory.measure()["peak_bytes"] <= 60e9
