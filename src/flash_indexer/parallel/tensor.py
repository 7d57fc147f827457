"""Teacher heads sharded over the ranks of a group; every rank works on its own rows of the indexer.

    chunk n      teacher scores, local heads | reduce-scatter over rows | KL and index gradients of own rows
    chunk n + 1              teacher scores, local heads | reduce-scatter ...

The reduce-scatter of a chunk runs while the next chunk's teacher scores and the last one's gradients are computed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flash_indexer.ops import (
    IndexerKL,
    Problem,
    Stages,
    Sums,
    WaitForKeys,
    among_all,
    body_of,
    check_arithmetic,
    check_indexer_kl,
    check_workspace,
    indexer_kl_sums,
    make_stages,
    run_stages,
    weighted_part,
)
from flash_indexer.parallel.groups import process_groups, reduce_scatter
from flash_indexer.parallel.loss import finish, mean_weight, total, wanted

_OP = "tensor_parallel_indexer_kl"


def tensor_parallel_indexer_kl(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    index_weights: Tensor,
    *,
    group: ProcessGroup | DeviceMesh,
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
    """`indexer_kl` of all heads, each rank holding some: u[t,s] = sum over ranks of sum over its heads of exp(...).

        loss = sum_t token_weight[t] * KL[t],    p[t,s] = u[t,s] / sum_s u[t,s]

    Equal to `indexer_kl` of the heads of all ranks but for the order in which u is summed. The un-normalised u of a
    chunk of rows is reduce-scattered, and each rank takes KL and index gradients of its own rows; then the rows are
    exchanged and d_index_k, in float32, is added up once.

    Args:
        q: [T, H_local, D], k: [S, G_local, D], lse: [T, H_local]: this rank's heads, constants. With one key head for
            all (MQA, absorbed MLA) k is the same on every rank. The ranks may hold different numbers of heads.
        index_q, index_k, index_weights, key_start, key_end, token_weight: as in `indexer_kl`, the same on every rank,
            and so are workspace_bytes and what requires a gradient.
        group: the ranks, as a process group or a mesh of one dimension.
        target: "mean" or "sum_logits". "per_head" has nothing to add up: call `indexer_kl` on each rank's heads.
        workspace_bytes: as in `indexer_kl`, for each rank; a chunk has at least one 128-token block a rank on CUDA.
        index_dtype, teacher_dtype: as in `indexer_kl`; a row is of one head, so it is rotated and rounded as there.

    Returns:
        As `indexer_kl`, complete and the same on every rank: loss, kl [T], entropy [T], and in backward all gradients,
        so that replicated indexer parameters get the same gradient everywhere: neither sum nor average it over the
        group.

    Raises:
        ValueError, TypeError: naming the argument, what it must be and what it is.
    """
    tensors = dict(
        q=q, k=k, index_q=index_q, index_k=index_k, index_weights=index_weights, lse=lse, token_weight=token_weight
    )
    check_indexer_kl(tensors, key_start, key_end, target, softmax_scale, op=_OP)
    check_workspace(_OP, workspace_bytes)
    check_arithmetic(_OP, q, k, index_q, index_dtype, teacher_dtype)
    check_sums_over_heads(_OP, target)
    (ranks,) = process_groups(_OP, group, 1)
    leaves = (index_q, index_k, index_weights)
    needs = wanted(leaves)
    with torch.no_grad():
        weight = mean_weight(key_start, key_end, index_weights, None) if token_weight is None else token_weight
        problem = Problem(
            q, k, index_q.detach(), index_k.detach(), index_weights.detach(), lse, key_start, key_end, weight,
            softmax_scale, target, workspace_bytes, needs, None, None, index_dtype, teacher_dtype,
        )  # fmt: skip
        body = body_of(problem, _OP)
        problem, rows = weighted_part(problem)
        sums = sharded_sums(problem, body, ranks)
        if sums.d_index_k is not None:
            dist.all_reduce(sums.d_index_k, group=ranks)
        loss = total(problem, sums.kl, None)
        sums = among_all(sums, rows, q.shape[0])
    return finish(_OP, body, loss, sums, leaves)


def sharded_sums(problem: Problem, body: str, group: ProcessGroup, wait_for_keys: WaitForKeys | None = None) -> Sums:
    """`ops.indexer_kl_sums` over the heads of all ranks; d_index_k is this rank's share, all else complete."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if world == 1:
        return indexer_kl_sums(problem, wait_for_keys)
    stages = make_stages(problem, body, rank, world, wait_for_keys)
    exchanged: list[dist.Work] = []

    def exchange(n: int) -> None:
        if stages.sums.d_index_q is not None:
            exchanged.extend(exchange_rows(stages.sums.d_index_q, stages, n, group))

    sums = run_stages(stages, problem.q.device, lambda scores: reduce_scatter(scores, group), exchange)
    for values in (sums.kl, sums.entropy, sums.d_index_weights):
        if values is not None:
            dist.all_reduce(values, group=group)  # zeros but for each rank's own rows: exact
    for work in exchanged:
        work.wait()
    return sums


def exchange_rows(x: Tensor, stages: Stages, n: int, group: ProcessGroup) -> list[dist.Work]:
    """Sends each rank's rows of chunk n of x to the others, in place, without waiting."""
    rows = enumerate(stages.rows(n))
    works = [dist.broadcast(x[b:e], group=group, group_src=r, async_op=True) for r, (b, e) in rows if e > b]
    return [work for work in works if work is not None]


def check_sums_over_heads(op: str, target: str) -> None:
    """Raises ValueError for a target that adds nothing up over the teacher's heads."""
    if target == "per_head":
        raise ValueError(
            f'{op}: target must be "mean" or "sum_logits" where heads are sharded, got "per_head"; its heads have '
            "nothing in common, so call indexer_kl on each rank's own teacher and index heads"
        )
