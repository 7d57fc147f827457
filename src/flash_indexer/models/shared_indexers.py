"""One indexer for several layers: its operands from the layer that makes them to the last that uses them.

    loss = mean over the teachers l of KL(p_l || softmax(i)),   d loss / d i = softmax(i) - mean over l of p_l

which is the gradient of the KL to the averaged target, without ever holding two targets at once.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

Operands = tuple[Tensor, Tensor, Tensor]
"""index_q, index_k, index_weights."""


class LayerLoss(NamedTuple):
    """Means over the tokens of the last forward, nats; of an indexer with several teachers, means over these too."""

    kl: Tensor
    uniform_kl: Tensor


class SharedOperands:
    """An indexer's operands in one forward, the gradients that its teachers have added, and their losses.

    Args:
        operands: with the graph to the indexer's parameters, where it trains.
        teachers: how many layers' attention is a target of this indexer.
    """

    def __init__(self, operands: Operands, teachers: int) -> None:
        self.teachers, self.operands = teachers, operands
        self._gradients: list[Tensor] | None = None
        self._losses: list[LayerLoss] = []

    def for_layer(self, device: torch.device) -> Operands:
        """The operands for one layer: themselves for a single teacher, else copies that collect its gradients."""
        if self.teachers == 1 and self.operands[0].device == device:
            return self.operands
        trains = self.operands[0].requires_grad and self.teachers > 1
        moved = (x.detach().to(device).requires_grad_(trains) for x in self.operands)
        return cast(Operands, tuple(moved))

    def add(self, operands: Operands, loss: LayerLoss) -> LayerLoss | None:
        """Takes up one teacher's loss, and the gradients of the operands that `for_layer` gave.

        Returns:
            the mean loss, when this was the last teacher; the indexer's parameters then have their gradients.
        """
        self._losses.append(loss)
        if self.teachers > 1 and operands[0].requires_grad:
            found = [
                (torch.zeros_like(x) if x.grad is None else x.grad).to(own.device)
                for x, own in zip(operands, self.operands, strict=True)
            ]
            before = self._gradients
            self._gradients = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
        if len(self._losses) < self.teachers:
            return None
        if self._gradients is not None:
            torch.autograd.backward(self.operands, self._gradients)
            self._gradients = None
        if len(self._losses) == 1:
            return self._losses[0]
        device = self._losses[0].kl.device
        each = (torch.stack([x.to(device) for x in values]).mean() for values in zip(*self._losses, strict=True))
        return LayerLoss(*each)
