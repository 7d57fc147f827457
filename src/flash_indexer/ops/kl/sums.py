"""What `indexer_kl` is made of before anything is rounded: KL of each query and the gradients, index_k's as a sum.

Whoever adds the gradients of index_k of several processes, or computes while keys still arrive, starts from here.
"""

from __future__ import annotations

from flash_indexer.ops import bodies
from flash_indexer.ops.attention import per_head_op
from flash_indexer.ops.bodies import TORCH
from flash_indexer.ops.checks import softcap_refusal
from flash_indexer.ops.kl import gpu_body
from flash_indexer.ops.kl.arithmetic import straight_through, with_wide_index, with_wide_teacher
from flash_indexer.ops.kl.gpu_stages import GpuStages
from flash_indexer.ops.kl.stages import Stages, run_stages
from flash_indexer.ops.kl.torch_stages import TorchStages
from flash_indexer.ops.problem import Problem, Sums, WaitForKeys


def body_of(problem: Problem, op: str = "indexer_kl") -> str:
    """The body that runs the problem.

    Raises:
        ValueError: naming why no kernel takes it, on a GPU.
    """
    if problem.target == "per_head" and problem.softcap is None:
        return per_head_op.body_of(op, problem.q, problem.k, problem.index_q)
    refusal = softcap_refusal(problem.softcap)
    return bodies.choose(op, problem.q.device, lambda: refusal or gpu_body.refusal(problem.q, problem.index_q))


def indexer_kl_sums(problem: Problem, wait_for_keys: WaitForKeys | None = None) -> Sums:
    """`indexer_kl`'s KL and gradients on one process, without autograd. token_weight must be filled in.

    wait_for_keys: see `WaitForKeys`; k must be contiguous then, and aligned as new tensors are.
    """
    body = body_of(problem)
    if problem.target == "per_head" and body != TORCH:
        if problem.teacher_dtype is not None and wait_for_keys is not None:
            wait_for_keys(problem.k.shape[0])
        wide = with_wide_index(with_wide_teacher(problem))
        return straight_through(per_head_op.per_head_sums(wide, wait_for_keys), problem.index_dtype)
    return run_stages(make_stages(problem, body, wait_for_keys=wait_for_keys), problem.q.device)


def make_stages(
    problem: Problem, body: str, rank: int = 0, world: int = 1, wait_for_keys: WaitForKeys | None = None
) -> Stages:
    """The stages of a body. The target is "mean" or "sum_logits", in torch on one process also "per_head"."""
    kind = TorchStages if body == TORCH else GpuStages
    return kind(problem, rank, world, wait_for_keys)
