"""Whether the teacher is the model's own attention, looked at while the model runs.

At the first forward, at the first one with several documents in a row, and whenever sequences get twice as long: each
layer's own mask is compared with the intervals of the teacher, and each attached layer's attention module is run twice
more on the first tokens of the same hidden states, once attached and once with Transformers' eager attention.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash_indexer.models.capture import AttentionForm
from flash_indexer.models.documents import document_begins
from flash_indexer.models.layer_mask import LayerMask
from flash_indexer.models.packing import Packing, causal_attention, packing
from flash_indexer.parallel.mesh import Parallel

QUERIES = 256
"""Queries of each layer that are compared at most."""
TOLERANCE, LOW_TOLERANCE = 1e-3, 0.06
"""Largest rms difference of outputs and probabilities, over their own rms: in float32 (in which eager attention forms
probabilities of float64 logits too), and in 16-bit dtypes, to which it rounds logits and probabilities."""
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


class Verification:
    """The comparisons of one attached model, and what was found.

    Attributes:
        replaying: whether the attention function is called by a comparison.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.replaying = False
        self._parallel = parallel
        self._done: set[tuple[bool, int]] = set()
        self._due: tuple[bool, int] | None = None
        self._positions: Tensor | None = None
        self._packed: Packing | None = None
        self._masks: dict[int, LayerMask | None] = {}
        self._failures: list[str] = []
        self._said = False
        self._teacher: Tensor | None = None

    def begin(self, positions: Tensor) -> None:
        """Before the decoder runs on tokens at positions [B, L] of this process."""
        kind = bool((positions.diff(dim=1) != 1).any()), positions.shape[1].bit_length()
        self._due = None if kind in self._done else kind
        self._positions = positions if self._due is not None else None
        self._packed = packing(positions) if self._due is not None else None
        self._failures = []

    def end(self) -> None:
        """After the decoder, also where it raised."""
        self._due = self._positions = self._packed = None
        self._masks = {}

    @torch.no_grad()
    def check_mask(self, layer: int, form: AttentionForm, mask: LayerMask | None) -> None:
        """Compares what the layer's own mask says of sampled queries with the keys that the teacher sees."""
        if self._positions is None or self._packed is None:
            return
        self._masks[layer] = mask
        B, L = self._positions.shape
        queries = torch.linspace(0, L - 1, min(L, max(1, QUERIES // B)), device=self._positions.device).long()
        first = torch.arange(B, device=queries.device)[:, None] * L
        start, end = (x.view(B, L).long()[:, queries] - first for x in self._packed.visible(form.window, form.chunk))
        s = torch.arange(L, device=queries.device)
        seen = (s >= start[..., None]) & (s < end[..., None])
        own = (s <= queries[:, None]).expand_as(seen)[:, None] if mask is None else mask.visible(queries)
        own = own.to(seen.device)
        wrong = (own != seen[:, None]).any(1)
        if bool(wrong.any()) and self._due is not None and self._due[0] and self._is_of_rows(form, queries, own):
            self._say_documents(layer)
        elif bool(wrong.any()):
            b, n, key = wrong.nonzero()[0].tolist()
            count = int(own[b, :, n].any(0).sum())
            self._fail(
                f"layer {layer}: query {int(queries[n])} sees {count} keys by the layer's own mask, {int(seen[b, n].sum())}"
                f" by the teacher's intervals, which differ first at key {key}{_why(self._due, own[b, :, n], end[b, n])}"
            )

    @torch.no_grad()
    def replay(self, layer: int, module: nn.Module, inputs: dict[str, Any]) -> None:
        """Runs a layer's attention module on the first tokens, attached and eager, and compares the two.

        inputs: the module's arguments in the forward, by name.
        """
        if self._positions is None or self.replaying or self._failures:
            return
        L = self._positions.shape[1]
        n = min(L, QUERIES)
        mask = self._masks.get(layer)
        queries = torch.arange(n, device=self._positions.device)
        seen = torch.ones(n, n, dtype=torch.bool, device=queries.device).tril()[None, None]
        if mask is not None:
            seen = mask.visible(queries)[:1, :, :, :n]
        seen = seen & self._within_documents(n)
        self._packed = packing(self._positions[:1, :n])
        short = {name: None if name in CACHES else shortened(value, L, n) for name, value in inputs.items()}
        try:
            self.replaying = True
            attached = _first(module.forward(**short))
            teacher, self._teacher = self._teacher, None
            hidden = next(x for x in short.values() if isinstance(x, Tensor))
            additive = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill_(~seen, torch.finfo(hidden.dtype).min)
            masked, name = with_mask(short, additive), "eager"
            if mask is None and short.get("attention_mask") is None:
                masked["attention_mask"] = additive
            elif mask is None:  # somewhere inside; sdpa takes no mask for a causal one, as eager does not
                name = "sdpa"
            with attention_function(module, name):
                result = module.forward(**masked)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            self._fail(
                f"layer {layer}: {type(module).__name__} could not be run with eager attention on {n} tokens: {error}"
            )
            return
        finally:
            self.replaying = False
            self._packed = packing(self._positions)
        differences = dict(output=difference(attached, _first(result)))
        weights = result[1] if isinstance(result, tuple) and len(result) > 1 else None
        if isinstance(weights, Tensor) and weights.ndim == 4 and teacher is not None:
            differences["attention"] = difference(teacher, weights[0].to(teacher.dtype).mean(0))
        for what, (error, allowed) in differences.items():
            if not error <= allowed:
                self._fail(
                    f"layer {layer}: the {what} of {type(module).__name__} differs from eager attention's by {error:.1e} "
                    f"of its size on {n} tokens, above {allowed:g}"
                )

    def attention(self, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
        """The attached attention of a replay: of this process's first tokens alone."""
        assert self._packed is not None
        out, lse = causal_attention(q, k, v, self._packed, form)
        key_start, key_end = self._packed.visible(form.window, form.chunk)
        s = torch.arange(k.shape[0], device=k.device)
        seen = (s >= key_start[:, None]) & (s < key_end[:, None])
        mean = torch.zeros(seen.shape, dtype=torch.float64, device=q.device)
        for h in range(q.shape[1]):
            x = form.softmax_scale * q[:, h].double() @ k[:, h * k.shape[1] // q.shape[1]].double().T
            x = x if form.softcap is None else form.softcap * (x / form.softcap).tanh()
            mean += (x - lse[:, h : h + 1].double()).exp().masked_fill_(~seen, 0.0) / q.shape[1]
        self._teacher = mean.to(q.dtype) if form.sinks is None else None  # some leave sinks out of what they return
        return out

    def conclude(self) -> None:
        """After the decoder: refuses what differed, in all processes of a run together.

        Raises:
            ValueError: naming a layer and what is different.
        """
        if self._due is None:
            return
        failed = torch.tensor(float(bool(self._failures)), device=self._positions.device)  # type: ignore[union-attr]
        if self._parallel.world > 1 and dist.is_initialized():
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if bool(failed):
            found = self._failures[0] if self._failures else "see the messages of the other processes"
            raise ValueError(
                f"attach: the teacher must be the model's own attention, but {found}. The model, or this form of batch, "
                "can't be used with the layers that are attached"
            )
        self._done.add(self._due)

    def _within_documents(self, n: int) -> Tensor:
        """[n, n]: whether two of the first row's first n tokens are of one document."""
        document = document_begins(self._positions[:1, :n])[0].cumsum(0)  # type: ignore[index]
        return document[:, None] == document

    def _is_of_rows(self, form: AttentionForm, queries: Tensor, own: Tensor) -> bool:
        """Whether a mask is the teacher's of rows that are one document each."""
        B, L = self._positions.shape  # type: ignore[union-attr]
        row = packing(torch.arange(L, device=queries.device)[None])
        start, end = (x[queries, None] for x in row.visible(form.window, form.chunk))
        s = torch.arange(L, device=queries.device)
        return bool((own == ((s >= start) & (s < end))).all())

    def _say_documents(self, layer: int) -> None:
        if not self._said:
            warnings.warn(
                f"attach: the model's own mask (layer {layer}'s, under eager and sdpa attention) lets the documents of a row "
                "see one another; here every document is attended alone, as by FlashAttention",
                stacklevel=2,
            )
        self._said = True

    def _fail(self, message: str) -> None:
        self._failures.append(message)


def _why(due: tuple[bool, int] | None, own: Tensor, end: Tensor) -> str:
    """What a difference between mask and intervals may come from."""
    if bool(own[..., int(end) :].any()):
        return ": the mask shows keys after the query (bidirectional attention)"
    if due is not None and due[0]:
        return ": documents of a row may be told apart wrongly; pass one document a row"
    return ""


@contextmanager
def attention_function(module: nn.Module, name: str) -> Iterator[None]:
    """The attention function of that name in one module."""
    config: Any = module.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def with_mask(value: Any, mask: Tensor) -> Any:
    """A module's arguments with `mask` in the place of the mask that only the attached function reads."""
    if isinstance(value, LayerMask):
        return mask
    return {name: with_mask(x, mask) for name, x in value.items()} if isinstance(value, Mapping) else value


def shortened(value: Any, length: int, n: int) -> Any:
    """The first row of a batch, and its first n of `length` tokens, in every tensor of a module's arguments."""
    if isinstance(value, Tensor):
        value = value[:1] if value.ndim >= 2 and value.shape[0] != length else value
        dim = next((dim for dim in (1, 2, 0) if dim < value.ndim and value.shape[dim] == length), None)
        return value if dim is None else value.narrow(dim, 0, n)
    if isinstance(value, tuple | list):
        return type(value)(shortened(x, length, n) for x in value)
    if isinstance(value, Mapping):
        return {name: shortened(x, length, n) for name, x in value.items()}
    return value


def difference(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest of the rms differences of rows over the rms of them all, and what it may be in got's dtype.

    Rows with values that are not finite are left out: eager attention spreads them over keys that nobody sees.
    """
    allowed = TOLERANCE if got.dtype.itemsize >= 4 else LOW_TOLERANCE
    got, wanted = (x.double().flatten(0, -2) for x in (got, wanted))
    finite = (got.isfinite() & wanted.isfinite()).all(-1)
    got, wanted = got[finite], wanted[finite]
    if not got.numel():
        return 0.0, allowed
    rms = wanted.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((got - wanted).square().mean(-1).sqrt() / rms).max()), allowed


def _first(output: Any) -> Tensor:
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value
