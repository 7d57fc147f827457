"""A result whose backward forms the probabilities again: it saves logsumexps, and may run more than once."""

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

    op: its name in messages. inputs, outputs: the names of its arguments and results, in order. result: the one of them
    that is differentiable; leaves: the arguments that get gradients. saved: the tensors, and constants: the other
    arguments, that `gradients` reads. gradients: from these by name, the upstream gradient of the result, and which
    gradients are wanted, one gradient for each of the leaves.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saved: tuple[str, ...]
    constants: tuple[str, ...]
    gradients: Callable[[Mapping[str, Any], Tensor, list[bool]], Sequence[Tensor]]
    result: str = "loss"
    leaves: tuple[str, ...] = LEAVES

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Saves what backward reads."""
        results = dict(zip(self.outputs, output, strict=True))
        values = dict(zip(self.inputs, inputs, strict=True)) | results
        ctx.mark_non_differentiable(*(x for name, x in results.items() if name != self.result))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(values[name] for name in self.saved))
        ctx.constants = {name: values[name] for name in self.constants}

    def backward(self, ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """A gradient for each argument, None but for the leaves that want one."""
        if torch.is_grad_enabled():
            what = "loss" if self.result == "loss" else "output"
            raise RuntimeError(
                f"{self.op}: the {what} has no second derivative; call backward without create_graph=True"
            )
        d_result = dict(zip(self.outputs, upstream, strict=True))[self.result]
        if d_result is None:
            return (None,) * len(self.inputs)
        wanted = [bool(ctx.needs_input_grad[self.inputs.index(name)]) for name in self.leaves]
        values = dict(zip(self.saved, ctx.saved_tensors, strict=True)) | ctx.constants
        gradients = dict(zip(self.leaves, self.gradients(values, d_result, wanted), strict=True))
        present = {name: gradients[name] for name, want in zip(self.leaves, wanted, strict=True) if want}
        return tuple(present.get(name) for name in self.inputs)
