"""A loss whose backward forms the probabilities again: it saves logsumexps, and may run more than once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_indexer.ops.problem import LEAVES


@dataclass(frozen=True)
class Recomputed:
    """What autograd has to know of such an operator; everything goes by name.

    op: its name in messages. inputs, outputs: the names of its arguments and results, in order; "loss" is the one
    result that is differentiable, LEAVES are the arguments that get gradients. saved: the tensors, and constants: the
    other arguments, that `gradients` reads. gradients: from these by name, the upstream gradient of the loss, and which
    gradients are wanted, one gradient for each of LEAVES.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saved: tuple[str, ...]
    constants: tuple[str, ...]
    gradients: Callable[[Mapping[str, Any], Tensor, list[bool]], Sequence[Tensor]]

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves what backward reads."""
        results = dict(zip(self.outputs, output, strict=True))
        values = dict(zip(self.inputs, inputs, strict=True)) | results
        ctx.mark_non_differentiable(*(x for name, x in results.items() if name != "loss"))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(values[name] for name in self.saved))
        ctx.constants = {name: values[name] for name in self.constants}

    def backward(self, ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """A gradient for each argument, None but for the leaves that want one."""
        if torch.is_grad_enabled():
            raise RuntimeError(f"{self.op}: the loss has no second derivative; call backward without create_graph=True")
        d_loss = dict(zip(self.outputs, upstream, strict=True))["loss"]
        if d_loss is None:
            return (None,) * len(self.inputs)
        wanted = [bool(ctx.needs_input_grad[self.inputs.index(name)]) for name in LEAVES]
        values = dict(zip(self.saved, ctx.saved_tensors, strict=True)) | ctx.constants
        gradients = dict(zip(LEAVES, self.gradients(values, d_loss, wanted), strict=True))
        present = {name: gradients[name] for name, want in zip(LEAVES, wanted, strict=True) if want}
        return tuple(present.get(name) for name in self.inputs)
