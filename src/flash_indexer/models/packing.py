"""The model's own attention over packed documents, with the logsumexp that the teacher needs."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_indexer.models.capture import AttentionForm
from flash_indexer.models.documents import document_begins
from flash_indexer.ops import attention_forward, share_beside_sinks
from flash_indexer.ops.worklists import read as read_intervals
from flash_indexer.parallel.context import context_positions, gather_tokens
from flash_indexer.parallel.mesh import Parallel

_ALONE = Parallel()


class Packing:
    """Where the documents of a batch lie once its rows are flattened into T tokens, S of them over all cp processes.

    Attributes:
        boundaries: first token of each document, and S at the end: cu_seqlens.
        document_start: int32 [S]: the first token of each token's document.
        rows: int32 [T]: this process's tokens among the S; without context parallelism 0, 1, ... and T = S.
        queries: int64 [R], ascending: those of the T tokens whose loss is computed; None: all.
    """

    def __init__(
        self, boundaries: tuple[int, ...], document_start: Tensor, rows: Tensor, queries: Tensor | None = None
    ) -> None:
        self.boundaries, self.document_start, self.rows, self.queries = boundaries, document_start, rows, queries
        self._visible: dict[tuple[int | None, int | None, bool], tuple[Tensor, Tensor]] = {}

    def visible(
        self, window: int | None, chunk: int | None = None, *, queries_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """key_start and key_end [T]: the same tensors for every layer, whose plans the operators then keep.

        window: a query sees at most so many keys. chunk: it sees those since the last multiple of so many tokens of its
        document. queries_only: those of `queries` alone, where these are given.
        """
        queries = self.queries if queries_only else None
        place = window, chunk, queries is not None
        if place not in self._visible:
            rows = self.rows if queries is None else self.rows[queries]
            key_start, key_end = self.document_start[rows], rows + 1
            if window is not None:
                key_start = torch.maximum(key_start, key_end - window)
            if chunk is not None:
                key_start = torch.maximum(key_start, rows - (rows - self.document_start[rows]) % chunk)
            self._visible[place] = key_start, key_end
        return self._visible[place]

    def read_ahead(self) -> None:
        """Reads what layers without window and chunk see, before they give the device work that would be waited for."""
        if self.rows.device.type == "cuda":
            for queries_only in (False, True)[: 1 if self.queries is None else 2]:
                read_intervals(*self.visible(None, queries_only=queries_only), len(self.document_start))


def packing(position_ids: Tensor, parallel: Parallel = _ALONE, queries: Tensor | None = None) -> Packing:
    """Documents of a batch: position_ids [B, L] restart wherever one begins; every row begins one.

    With context parallelism position_ids [1, T] are this process's part of one sequence of all the batch's tokens.
    queries: see `Packing`, on the device of position_ids.
    """
    group = parallel.group("cp")
    if group is None:
        rows = torch.arange(position_ids.numel(), dtype=torch.int32, device=position_ids.device)
    else:
        position_ids = gather_tokens(position_ids.flatten(), group, layout=parallel.layout)[None]
        rows = context_positions(position_ids.numel(), parallel.cp, parallel.cp_rank, layout=parallel.layout)
        rows = rows.to(position_ids.device, torch.int32)
    first = document_begins(position_ids).flatten().nonzero().flatten()
    token = torch.arange(position_ids.numel(), device=position_ids.device)
    document_start = first[torch.searchsorted(first, token, right=True) - 1]
    return Packing((*first.tolist(), position_ids.numel()), document_start.int(), rows, queries)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: Packing, form: AttentionForm, *, parallel: Parallel = _ALONE
) -> tuple[Tensor, Tensor]:
    """out[t,h] = sum_s a[t,h,s] * v[s,g(h)] with the softmax a of the form's logits, causal within each document; lse.

        lse[t,h] = log(sum_s exp(x[t,h,s]) + exp(sinks[h])),   a[t,h,s] = exp(x[t,h,s] - lse[t,h])

    On the CPU torch's flash attention, a document at a time; on a GPU, over the keys of all context-parallel processes,
    and for chunks and softcap, `attention_forward`.

    Args:
        q: [T, H, D]. k: [T, G, D]. v: [T, G, V]: this process's tokens and heads.

    Returns:
        out [T, H, V] in q's dtype and lse [T, H], natural logarithm, float32 (float64 for float64 inputs).
    """
    group = parallel.group("cp")
    if group is None and q.device.type == "cpu" and form.chunk is None and form.softcap is None:
        width = max(q.shape[-1], v.shape[-1])  # it wants one width; zeros change neither logits nor output
        query, key, value = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        out, lse = _flash_cpu(query, key, value, packed.boundaries, form.softmax_scale, form.window)
        return with_sinks(out[..., : v.shape[-1]], lse, form.sinks)
    if group is not None:
        k, v = (gather_tokens(x, group, layout=parallel.layout) for x in (k, v))
    query, key, value = (at_least_float32(x) if x.device.type == "cpu" else x for x in (q, k, v))
    key_start, key_end = packed.visible(form.window, form.chunk)
    out, lse = attention_forward(
        query, key, value, softmax_scale=form.softmax_scale, key_start=key_start, key_end=key_end, softcap=form.softcap
    )
    return with_sinks(out.to(q.dtype), lse, form.sinks)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """out [T, H, V] and lse [T, H] of a softmax in which sinks [H] take part as further logits, whose values are 0."""
    if sinks is None:
        return out, lse
    share, whole = share_beside_sinks(lse, sinks)
    return (out * share[..., None]).to(out.dtype), whole


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that: what the CPU operators take."""
    return x if x.dtype == torch.float64 else x.float()


def _flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], softmax_scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """One call of torch's CPU flash attention for each document."""
    per_group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for begin, end in itertools.pairwise(boundaries):
        query = q[begin:end].transpose(0, 1)[None]
        key, value = (x[begin:end].transpose(0, 1).repeat_interleave(per_group, 0)[None] for x in (k, v))
        mask = None
        if window is not None and window < end - begin:
            t = torch.arange(end - begin, device=q.device)
            seen = (t <= t[:, None]) & (t > t[:, None] - window)
            mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, mask is None, attn_mask=mask, scale=softmax_scale
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)
