"""Whether the teacher is the model's own attention, looked at while the model runs.

At the first forward, at the first one with several documents in a row, and whenever sequences get twice as long: each
layer's own mask is compared with the intervals of the teacher, and each attached layer's attention module is run twice
more on the first tokens of the same hidden states, once attached and once with Transformers' eager attention. A mask
that may depend on what a batch holds, as on its images, is compared in every forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flash_indexer.models.capture import AttentionForm
from flash_indexer.models.documents import document_begins
from flash_indexer.models.layer_mask import LayerMask
from flash_indexer.models.packing import Packing, causal_attention, packing
from flash_indexer.models.replay import attention_function, difference, first_output, shortened, tolerance, with_mask

QUERIES = 256
"""Queries of each layer that are compared at most."""
FAILURES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a layer's code may raise where it can't run on a part of its tokens."""


class _Batch(NamedTuple):
    """The tokens of a forward that is looked at. kind: whether rows have several documents; bits of their length."""

    positions: Tensor  # [B, L], of this process
    packed: Packing
    kind: tuple[bool, int]


class Verification:
    """The comparisons of one attached model, and what was found.

    Attributes:
        replaying: whether the attention function is called by a comparison.
    """

    def __init__(self) -> None:
        self.replaying = False
        self._batch: _Batch | None = None
        self._seen: _Batch | None = None
        self._positions: Tensor | None = None
        self._forwards = 0
        self._done: set[tuple[bool, int]] = set()
        self._masks: dict[int, LayerMask | None] = {}
        self._failures: list[str] = []
        self._said = False
        self._short: Packing | None = None
        self._teacher: Tensor | None = None

    def begin(self, positions: Tensor) -> None:
        """Before the decoder runs on tokens at positions [B, L] of this process."""
        kind = _kind(positions)
        self._seen = self._batch = None if kind in self._done else _Batch(positions, packing(positions), kind)
        self._positions, self._failures, self._masks = positions, [], {}
        self._forwards += 1

    def end(self) -> None:
        """After the decoder, also where it raised."""
        self._batch = self._seen = self._positions = None
        self._masks = {}

    @torch.no_grad()
    def check_mask(self, layer: int, form: AttentionForm, mask: LayerMask | None) -> None:
        """Compares what the layer's own mask says of sampled queries with the keys that the teacher sees."""
        if self._seen is None and mask is not None and mask.varies:
            assert self._positions is not None
            self._seen = _Batch(self._positions, packing(self._positions), _kind(self._positions))
        if (batch := self._batch if mask is None or not mask.varies else self._seen) is None:
            return
        self._masks[layer] = mask
        B, L = batch.positions.shape
        device = batch.positions.device
        queries = torch.linspace(0, L - 1, min(L, max(1, QUERIES // B)), device=device).long()
        if mask is not None and mask.varies:  # others in every forward: a short image lies between two queries
            queries = ((queries + self._forwards) % L).sort().values
        rows = torch.arange(B, device=device)[:, None] * L
        bounds = [x.view(B, L).long()[:, queries] - rows for x in batch.packed.visible(form.window, form.chunk)]
        teacher = _between(bounds, L)
        own = (torch.arange(L, device=device) <= queries[:, None]).expand(B, 1, -1, -1)
        if mask is not None:
            own = mask.visible(queries).to(device)
        differ = (own != teacher[:, None]).any(1)
        if not bool(differ.any()):
            return
        if batch.kind[0] and bool((own == _of_whole_rows(form, queries, L)).all()):
            self.say_documents(f"the mask that the model forms itself (layer {layer}'s) knows no documents")
            return
        b, n, key = differ.nonzero()[0].tolist()
        counts = int(own[b, :, n].any(0).sum()), int(teacher[b, n].sum())
        after = bool(own[b, :, n, int(bounds[1][b, n]) :].any())
        self._failures.append(
            f"layer {layer}: query {int(queries[n])} sees {counts[0]} keys by the layer's own mask and {counts[1]} by "
            f"the teacher's intervals, first different at key {key}"
            + (": the mask shows keys after the query (bidirectional attention)" if after else "")
        )

    @torch.no_grad()
    def replay(
        self,
        layer: int,
        module: nn.Module,
        inputs: dict[str, Any],
        change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """Runs a layer's attention module on the first tokens, attached and eager, and compares the two.

        inputs: the module's arguments in the forward, by name. change: what is done to those of the first tokens.
        """
        if self._batch is None or self.replaying or self._failures:
            return
        positions = self._batch.positions
        n = (min(positions.shape[1], QUERIES) - 1) // 2 * 2 + 1  # odd, see Float32Logits
        self._short = packing(positions[:1, :n])
        short = change(shortened(inputs, positions.shape[1], n))
        self.replaying = True
        try:
            attached = first_output(module.forward(**short))
            teacher, self._teacher = self._teacher, None
            own, weights = self._by_itself(layer, module, short, n)
        except FAILURES as error:
            self._failures.append(
                f"layer {layer}: {type(module).__name__} could not be run with eager attention on {n} tokens: {error}"
            )
            return
        finally:
            self.replaying = False
        allowed = tolerance(module, attached.dtype)
        compared = {"output": difference(attached, own)}
        if teacher is not None and weights is not None:
            compared["mean attention"] = difference(teacher, weights.to(teacher.dtype))
        for what, found in compared.items():
            if not found <= allowed:
                self._failures.append(
                    f"layer {layer}: the {what} of {type(module).__name__} differs from that of eager attention by "
                    f"{found:.1e} of its size on {n} tokens, above {allowed:g}"
                )

    def _by_itself(self, layer: int, module: nn.Module, inputs: dict[str, Any], n: int) -> tuple[Tensor, Tensor | None]:
        """The module's output without the attachment, and its heads' mean attention [n, n] where it returns any."""
        assert self._batch is not None
        mask, positions = self._masks.get(layer), self._batch.positions
        seen = torch.ones(1, 1, n, n, dtype=torch.bool, device=positions.device).tril()
        if mask is not None:
            seen = mask.visible(torch.arange(n, device=positions.device))[:1, :, :, :n]
        document = document_begins(positions[:1, :n])[0].cumsum(0)
        seen = seen & (document[:, None] == document)
        hidden = next(x for x in inputs.values() if isinstance(x, Tensor))
        additive = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill_(~seen, torch.finfo(hidden.dtype).min)
        inputs, name = with_mask(inputs, additive), "eager"
        if mask is None and inputs.get("attention_mask") is None:
            inputs["attention_mask"] = additive
        elif mask is None:  # somewhere inside of what stands there; without any, sdpa is causal and eager is not
            name = "sdpa"
        with attention_function(module, name):
            output = module.forward(**inputs)
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.ndim != 4 or weights.shape[-2:] != (n, n):
            return first_output(output), None
        return first_output(output), weights[0].mean(0)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        """The attached attention of a replay: of this process's first tokens alone."""
        assert self._short is not None
        out, lse = causal_attention(q, k, v, self._short, form)
        seen = _between(self._short.visible(form.window, form.chunk), k.shape[0])
        mean = torch.zeros(seen.shape, dtype=torch.float64, device=q.device)
        for h in range(q.shape[1]):
            x = form.softmax_scale * q[:, h].double() @ k[:, h * k.shape[1] // q.shape[1]].double().T
            x = x if form.softcap is None else form.softcap * (x / form.softcap).tanh()
            mean += (x - lse[:, h : h + 1].double()).exp().masked_fill_(~seen, 0.0) / q.shape[1]
        self._teacher = mean.to(q.dtype) if form.sinks is None else None  # some leave sinks out of what they return
        return out

    def conclude(self) -> None:
        """After the decoder: refuses what differed.

        Raises:
            ValueError: naming a layer and what is different.
        """
        if self._failures:
            raise ValueError(
                f"attach: the teacher must be the model's own attention, but {self._failures[0]}. The model, or this "
                "form of batch, can't be used with the layers that are attached"
            )
        if self._batch is not None:
            self._done.add(self._batch.kind)

    def say_documents(self, why: str) -> None:
        """Warns once that the model by itself would attend across the documents of a row."""
        if not self._said:
            warnings.warn(
                f"attach: {why}: without the attachment the documents of a row would see one another; attached, each "
                "is attended alone, as by FlashAttention",
                stacklevel=2,
            )
        self._said = True


def _kind(positions: Tensor) -> tuple[bool, int]:
    """What forwards have in common that need to be looked at once: see `_Batch`."""
    return bool((positions.diff(dim=1) != 1).any()), positions.shape[1].bit_length()


def _between(bounds: Sequence[Tensor], num_keys: int) -> Tensor:
    """start <= s < end for (start, end) [...]: bool [..., S]."""
    start, end = bounds
    s = torch.arange(num_keys, device=start.device)
    return (s >= start[..., None]) & (s < end[..., None])


def _of_whole_rows(form: AttentionForm, queries: Tensor, length: int) -> Tensor:
    """What queries [n] see in rows that are one document each: bool [n, L]."""
    row = packing(torch.arange(length, device=queries.device)[None])
    return _between([x[queries] for x in row.visible(form.window, form.chunk)], length)
