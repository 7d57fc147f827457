"""The sequence sharded over the ranks of a group: each has its queries' rows, and gathers all keys.

Gathered keys stand in global order, so that key intervals say who sees what and nothing else has to know of ranks.
Two layouts of n·world tokens:

    zigzag        2·world pieces, rank r holds pieces r and 2·world-1-r: under a causal mask all ranks see as many pairs
    contiguous    world pieces, rank r holds piece r
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flash_indexer.ops import (
    IndexerKL,
    Problem,
    among_all,
    body_of,
    check_arithmetic,
    check_indexer_kl,
    check_workspace,
    indexer_kl_sums,
    weighted_part,
)
from flash_indexer.parallel.groups import Group, all_gather, process_groups, reduce_scatter
from flash_indexer.parallel.loss import finish, mean_weight, total, wanted
from flash_indexer.parallel.tensor import check_sums_over_heads, sharded_sums

LAYOUTS = ("zigzag", "contiguous")
WIDE_BYTES = 256 * 2**20  # of all ranks' keys, from which they are sent piece by piece beside the computation
_OP = "context_parallel_indexer_kl"


def context_positions(length: int, world_size: int, rank: int, *, layout: str = "zigzag") -> Tensor:
    """The global positions of the tokens that this rank holds, ascending: int64 [length / world_size].

        zigzag        pieces rank and 2·world_size-1-rank of 2·world_size
        contiguous    piece rank of world_size

    Raises:
        ValueError: for a length that the number of pieces does not divide, naming the next that it does.
    """
    owners = piece_owners(world_size, layout, "context_positions")
    if not 0 <= rank < world_size:
        raise ValueError(f"context_positions: rank must be 0 to {world_size - 1}, got {rank}")
    if length % len(owners):
        longer = -(-length // len(owners)) * len(owners)
        raise ValueError(
            f"context_positions: length must be a multiple of {len(owners)} (the pieces of {layout} on {world_size} "
            f"ranks), got {length}; pad to {longer} with tokens that see nothing (key_start == key_end), "
            "zeros in every tensor: NaN or infinity there would reach the gradients"
        )
    size = length // len(owners)
    return torch.cat([torch.arange(j * size, (j + 1) * size) for j, owner in enumerate(owners) if owner == rank])


def gather_tokens(x: Tensor, group: ProcessGroup | DeviceMesh, *, layout: str = "zigzag") -> Tensor:
    """The rows of all ranks in global order: [n, ...] on each rank -> [n·world, ...]. Not differentiable.

    Every rank must hold as many rows. One all-gather and, but for "contiguous", one copy.

    Raises:
        ValueError: for an unknown layout, or rows that don't divide into a rank's pieces.
    """
    (ranks,) = process_groups("gather_tokens", group, 1)
    owners = piece_owners(dist.get_world_size(ranks), layout, "gather_tokens")
    check_rows("gather_tokens", "x", x, owners)
    with torch.no_grad():
        return in_order(all_gather(x.detach(), ranks), owners)


def gather_with_gradient(x: Tensor, group: ProcessGroup, *, layout: str = "zigzag") -> Tensor:
    """`gather_tokens`, differentiable: a row's gradient is the sum over ranks of theirs, and goes to its owner.

    Every rank runs backward.
    """
    owners = piece_owners(dist.get_world_size(group), layout, "gather_with_gradient")
    check_rows("gather_with_gradient", "x", x, owners)
    gathered: Tensor = _Gather.apply(x, group, owners)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, owners: list[int]) -> Tensor:
        ctx.group, ctx.owners = group, owners
        return in_order(all_gather(x, group), owners)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        whole = by_owner(gradient.to(sum_dtype(gradient)), ctx.owners)
        return reduce_scatter(whole, ctx.group)().to(gradient.dtype), None, None


def sum_dtype(x: Tensor) -> torch.dtype:
    """In which ranks' shares are added: float32, or float64 where x has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def context_parallel_indexer_kl(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    group: Group,
    layout: str = "zigzag",
    softmax_scale: float,
    key_start: Tensor,
    key_end: Tensor,
    lse: Tensor | None = None,
    target: str = "mean",
    token_weight: Tensor | None = None,
    workspace_bytes: int = 2**30,
    index_dtype: str | None = None,
    teacher_dtype: str | None = None,
) -> IndexerKL:
    """`indexer_kl` of the tokens of all ranks, each rank holding some:

        L = sum over ranks, sum_t token_weight[t] * KL[t]              token_weight None: 1/n, n over all ranks
        loss = L on every rank;  backward gives dL / d(this rank's index_q, index_k, index_weights)

    L depends on a rank's index_k through the queries of all ranks: their shares of d_index_k are added in float32 and
    rounded once, at the owner. The gradients of parameters that produced these tensors are therefore each rank's part
    of one sum: add them over the group, do not average.

    Args:
        q, index_q, index_weights, lse, token_weight: this rank's rows, [T_local, ...] as in `indexer_kl`: those of its
            tokens, or any of them, as many on each rank as it likes.
        k, index_k: this rank's keys, sharded by the same layout, [S_local, ...]; as many on every rank. A sequence that
            doesn't divide is padded with tokens that see nothing.
        key_start, key_end: int32 [T_local], this rank's rows of the intervals; they count global keys.
        group: the ranks that share the sequence, as a process group or a mesh of one dimension. Or (context, tensor), a
            mesh of two dimensions or a pair of groups, where q, k and lse also hold only this rank's heads: see
            `tensor_parallel_indexer_kl`; all else is then the same on the ranks of the tensor group.
        layout: "zigzag" or "contiguous".
        target: as in `indexer_kl`; not "per_head" with a tensor group.
        workspace_bytes: as in `indexer_kl`, for each rank. The gathered k and index_k come on top of it.
        index_dtype, teacher_dtype: as in `indexer_kl`; keys are gathered in their own dtype, then rotated and rounded.

    The same upstream gradient is expected on every rank. Keys of more than 256 MiB are sent piece by piece in global
    order; a chunk of queries starts as soon as the keys that it sees are there (with lse given; finding it needs all,
    and so do the kernels of "per_head", which take a rank's queries in one pass).

    Returns:
        loss: scalar. kl, entropy: of this rank's rows, as in `indexer_kl`.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.
    """
    tensors = dict(
        q=q, k=k, index_q=index_q, index_k=index_k, index_weights=index_weights, lse=lse, token_weight=token_weight
    )
    check_indexer_kl(tensors, key_start, key_end, target, softmax_scale, op=_OP)
    check_workspace(_OP, workspace_bytes)
    check_arithmetic(_OP, q, k, index_q, index_dtype, teacher_dtype)
    ranks, *heads = process_groups(_OP, group, 2)
    if heads:
        check_sums_over_heads(_OP, target)
    owners = piece_owners(dist.get_world_size(ranks), layout, _OP)
    check_rows(_OP, "k", k, owners)
    leaves = (index_q, index_k, index_weights)
    needs = wanted(leaves)
    with torch.no_grad():
        weight = mean_weight(key_start, key_end, index_weights, ranks) if token_weight is None else token_weight
        keys = gather_tokens(index_k, ranks, layout=layout)
        teacher_keys, wait_for_keys = gather_while_computing(k.detach(), ranks, owners)
        problem = Problem(
            q.detach(), teacher_keys, index_q.detach(), keys, index_weights.detach(), lse, key_start, key_end, weight,
            softmax_scale, target, workspace_bytes, needs, None, None, index_dtype, teacher_dtype,
        )  # fmt: skip
        body = body_of(problem, _OP)
        problem, rows = weighted_part(problem)
        if heads:
            sums = sharded_sums(problem, body, heads[0], wait_for_keys)
        else:
            sums = indexer_kl_sums(problem, wait_for_keys)
        wait_for_keys(teacher_keys.shape[0])
        if sums.d_index_k is not None:
            own = reduce_scatter(by_owner(sums.d_index_k, owners), ranks)()
            if heads:
                dist.all_reduce(own, group=heads[0])
            sums = sums._replace(d_index_k=own)
        loss = total(problem, sums.kl, ranks)
        sums = among_all(sums, rows, q.shape[0])
    return finish(_OP, body, loss, sums, leaves)


def piece_owners(world_size: int, layout: str, op: str) -> list[int]:
    """The rank that holds each piece, in global order."""
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    ranks = list(range(world_size))
    return ranks + ranks[::-1] if layout == "zigzag" else ranks


def check_rows(op: str, name: str, x: Tensor, owners: list[int]) -> None:
    """Raises ValueError where a rank's rows of x don't divide into its pieces."""
    pieces = owners.count(0)
    if x.ndim == 0 or x.shape[0] % pieces:
        rows = 0 if x.ndim == 0 else x.shape[0]
        raise ValueError(
            f"{op}: {name} must have a multiple of {pieces} rows on each rank, its pieces of the sequence, got {rows}; "
            "shard by context_positions"
        )


def in_order(gathered: Tensor, owners: list[int]) -> Tensor:
    """Rank after rank -> global order."""
    at = ranked(owners)
    return move(gathered, [at.index(j) for j in range(len(at))])


def by_owner(x: Tensor, owners: list[int]) -> Tensor:
    """Global order -> rank after rank: undoes `in_order`."""
    return move(x, ranked(owners))


def ranked(owners: list[int]) -> list[int]:
    """The pieces of rank 0, of rank 1, ...: their places in global order."""
    return sorted(range(len(owners)), key=lambda j: (owners[j], j))


def move(x: Tensor, order: list[int]) -> Tensor:
    """Cuts x's rows into pieces and puts piece order[n] at place n; x itself where nothing moves."""
    if order == sorted(order) or x.shape[0] == 0:
        return x
    pieces = x.chunk(len(order))
    return torch.cat([pieces[n] for n in order])


def gather_while_computing(x: Tensor, group: ProcessGroup, owners: list[int]) -> tuple[Tensor, Callable[[int], None]]:
    """The rows of all ranks in global order, and a function that waits for those before the n-th.

    Few bytes: one all-gather. Many: each piece is sent by its owner straight to its place, first pieces first, while
    the caller goes on; no second copy of the rows is ever held.
    """
    world = dist.get_world_size(group)
    if x.nbytes * world < WIDE_BYTES or x.numel() == 0:
        gathered = in_order(all_gather(x, group), owners)
        return gathered, lambda end: None
    gathered = x.new_empty(x.shape[0] * world, *x.shape[1:])
    mine = iter(x.chunk(owners.count(0)))
    rank, size = dist.get_rank(group), gathered.shape[0] // len(owners)
    works: list[dist.Work | None] = []
    for owner, piece in zip(owners, gathered.chunk(len(owners)), strict=True):
        if owner == rank:
            piece.copy_(next(mine))
        works.append(dist.broadcast(piece, group=group, group_src=owner, async_op=True))

    def wait(end: int) -> None:
        for n in range(min(-(-end // size), len(works))):
            work, works[n] = works[n], None
            if work is not None:
                work.wait()

    return gathered, wait
