"""A loss that knows its gradients: they are computed with it, and backward scales them, in place, so it may run once.

The custom operator of one process registers `save` and `backward`, for compilers and for whoever else follows what is
called. `known_loss` is the same without an operator: around a loss that several processes have put together, and where
nobody follows (`is_followed`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flash_indexer.ops import launch
from flash_indexer.ops.bodies import TORCH

_PLAIN = (Tensor, nn.Parameter)


def save(ctx: Any, op: str, body: str, gradients: Sequence[Tensor]) -> None:
    """Keeps the gradients of the leaves, empty where not wanted, for `backward`; body: which one made them."""
    ctx.set_materialize_grads(False)  # upstream gradients of other outputs than the loss: zeros nobody reads
    ctx.save_for_backward(*gradients)
    ctx.op, ctx.body, ctx.consumed = op, body, False


def backward(ctx: Any, d_loss: Tensor) -> list[Tensor]:
    """d_loss * the saved gradients, empty where not wanted.

    Raises:
        RuntimeError: for a second backward, and for a second derivative.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{ctx.op}: the loss has no second derivative; call backward without create_graph=True")
    if ctx.consumed:
        raise RuntimeError(
            f"{ctx.op}: backward already ran and scaled the gradients in place; compute the loss again for a "
            "second backward, or add the losses and call backward once"
        )
    ctx.consumed = True
    gradients: list[Tensor] = list(ctx.saved_tensors)
    if any(type(gradient) is not Tensor for gradient in gradients):  # a compiler's tracing tensors want it functional
        gradients = [gradient * d_loss for gradient in gradients]
    elif ctx.body == TORCH:
        for gradient in gradients:
            gradient.mul_(d_loss)
    else:
        launch.scale(gradients, d_loss)
    return gradients


def is_followed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody besides autograd follows a call on these tensors, who must then see a custom operator.

    A compiler or tracer, a mode (a default device is one), a transform of torch.func, tensors without memory or of a
    kind of their own. Where nobody does, the operator and its registered autograd, which cost host time, are left out.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or any(x is not None and (type(x) not in _PLAIN or x.is_meta) for x in tensors)
    )


def known_loss(
    op: str, body: str, loss: Tensor, gradients: Sequence[Tensor | None], leaves: Sequence[Tensor]
) -> Tensor:
    """The loss as a function of the leaves, with these gradients (None: not wanted); it takes loss and gradients over.

    Each gradient is rounded to its leaf's dtype once, here.
    """
    rounded = [None if x is None else x.to(leaf.dtype) for x, leaf in zip(gradients, leaves, strict=True)]
    known: Tensor = _KnownLoss.apply(op, body, (loss, rounded), *leaves)  # type: ignore[no-untyped-call]
    return known


class _KnownLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, body: str, known: tuple[Tensor, list[Tensor | None]], *leaves: Tensor) -> Tensor:
        """known: the loss and its gradients, in a tuple, where autograd doesn't take them for inputs."""
        loss, gradients = known
        ctx.wanted = [gradient is not None for gradient in gradients]
        absent = [leaf.new_empty(0) for leaf in leaves]  # in each leaf's dtype, as the kernel that scales wants it
        save(ctx, op, body, [none if x is None else x for x, none in zip(gradients, absent, strict=True)])
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = backward(ctx, d_loss)
        return None, None, None, *(x if wanted else None for x, wanted in zip(scaled, ctx.wanted, strict=True))
