"""A model's own indexers in the sparse stage: they select what its layers attend to, and train in place.

Transformers computes them without gradients, and so can't train them; what it selects is what is selected here, but for
keys of equal scores, of which the lowest are taken. Where a layer's indexer serves the next layers too, all of them
attend to its keys, and by teachers="shared" it learns from each:

    loss = mean over the layers l that it serves of KL over S_t of (p_l || softmax(i))
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flash_indexer.models.families import given_cache
from flash_indexer.models.handle import IndexerHandle
from flash_indexer.models.hooks import uncompiled
from flash_indexer.models.index_cache import prepare_layer
from flash_indexer.models.own_hooks import all_keys, stand_in
from flash_indexer.models.own_indexers import indexer_sources, own_indexer, thaw_own
from flash_indexer.models.shared_indexers import LayerLoss, Operands, SharedOperands
from flash_indexer.models.sparse import Leaves, SparseHandle, install_sparsely, sparse_handle
from flash_indexer.models.sparse_checks import check_sparse
from flash_indexer.models.sparse_forward import SparseForward
from flash_indexer.models.sparse_hooks import Attend, SparseTap
from flash_indexer.models.sparse_hooks import attention as sparse_attention_function
from flash_indexer.ops import Selection

OWN_SPARSE_ATTENTION = "lightning_indexer_own_sparse"
"""The name of the registered functions."""


class OwnSparseTap(SparseTap):
    """One layer's place in a sparse decoder whose indexers are its own, and what its indexer was called with."""

    def __init__(self, attend: Attend, layer: int, module: nn.Module, *, is_attached: bool) -> None:
        super().__init__(attend, layer, module, is_attached=is_attached, rotary=None)
        self.positions: Tensor | None = None

    def install(self) -> list[Callable[[], object]]:
        """Stands in for the layer's indexer, where it has one, and reads its cache; what takes each off again."""
        reads = self.module.register_forward_pre_hook(uncompiled(self.read_inputs), with_kwargs=True)
        undo: list[Callable[[], object]] = [reads.remove]
        if (own := own_indexer(self.module)) is not None:
            undo.append(stand_in(own, self.read_call))
        return undo

    def read_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer's self-attention, and so before it writes to its cache."""
        self.cache = given_cache(kwargs)
        if self.cache is not None and own_indexer(self.module) is not None:
            prepare_layer(self.cache, self.layer)

    def read_call(self, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of the indexer's forward: notes its inputs. The selection comes later: int32 [B, L, 0]."""
        inputs = signature.bind(None, *args, **kwargs).arguments
        self.hidden, self.q_residual = inputs["hidden_states"], inputs.get("q_resid")
        self.rope, self.positions = inputs["position_embeddings"], inputs.get("position_ids")
        assert self.hidden is not None
        B, L, _ = self.hidden.shape
        return all_keys(B, L, 0, self.hidden.device)

    def operands(self, indexer: nn.Module, wide: Callable[[Tensor], Tensor]) -> Operands:
        """The operands of the model's own scores, at the positions that it gave its indexer."""
        assert self.hidden is not None
        places, self.positions = self.positions, None
        places = None if places is None else places.expand(self.hidden.shape[:2]).flatten()
        made: Operands = indexer(*self.take(wide), None, places)
        return made


class OwnSparseHandle(SparseHandle):
    """Indexers of a model's own that select what its layers attend to. See `own_sparse_handle`."""

    def __init__(self, dense: IndexerHandle, topk: int) -> None:
        super().__init__(dense, topk)
        self._held: WeakKeyDictionary[SparseForward, dict[int, SharedOperands]] = WeakKeyDictionary()

    def losses(self) -> dict[int, LayerLoss]:
        """As SparseHandle's, by the layer that has the indexer; of several teachers the mean."""
        each, found = super().losses(), {}
        for source in self.layers:
            if of := [each[n] for n in self._served(source) if n in each and self._teaches(n)]:
                device = of[0].kl.device
                means = (torch.stack([x.to(device) for x in values]).mean() for values in zip(*of, strict=True))
                found[source] = LayerLoss(*means)
        return found

    def _teaches(self, layer: int) -> bool:
        return self.teachers == "shared" or self.sources[layer] == layer

    def _learns(self, tap: SparseTap, forward: SparseForward) -> bool:
        return super()._learns(tap, forward) and self._teaches(tap.layer)

    def _leaves(self, tap: SparseTap, forward: SparseForward, q: Tensor) -> Leaves:
        """Those of the layer's indexer, made in this layer or in the earlier one that has it."""
        source = self.sources[tap.layer]
        served = self._served(source)
        made = super()._leaves(tap, forward, q) if source == tap.layer else None
        if made is not None and len(served) == 1:
            return made
        held = self._held.setdefault(forward, {})
        teachers = len(served) if self.teachers == "shared" else 1
        if made is not None and source not in held:
            held[source] = SharedOperands(made, teachers)
        whole = held[source].operands if made is None else made  # made anew in the backward of activation checkpointing
        if not self._learns(tap, forward):
            return cast(Leaves, tuple(x.detach().to(q.device) for x in whole))
        if not forward.has_gradients:
            return held[source].for_layer(q.device)
        return cast(Leaves, tuple(_part_of_mean(x.to(q.device), teachers) for x in whole))

    def _learn(
        self,
        tap: SparseTap,
        forward: SparseForward,
        qk: tuple[Tensor, Tensor],
        leaves: Leaves,
        selection: Selection,
        scale: float,
        lse: Tensor,
    ) -> Tensor:
        """As SparseHandle's; the last of several teachers takes all gradients to the indexer."""
        kl = super()._learn(tap, forward, qk, leaves, selection, scale, lse)
        held = self._held.get(forward, {})
        if (shared := held.get(self.sources[tap.layer])) is not None and shared.teachers > 1:
            for x in leaves:
                x.grad = None if x.grad is None else x.grad / shared.teachers
            if shared.add(leaves, LayerLoss(kl.mean(), forward.uniform_kl[tap.layer].mean())) is not None:
                del held[self.sources[tap.layer]]
        return kl


def _part_of_mean(x: Tensor, parts: int) -> Tensor:
    """x, of whose gradient one part counts."""
    part = x.view_as(x)
    if part.requires_grad:
        part.register_hook(lambda gradient: gradient / parts)  # type: ignore[no-untyped-call]
    return part


def own_sparse_handle(dense: IndexerHandle, topk: int) -> OwnSparseHandle:
    """Makes the layers of a model that its own indexers serve attend to the `topk` keys that these rank highest.

    As `sparse_handle` does with fresh ones; layers without an indexer, as those of a sliding window, stay as they are.
    What is computed is the model's own sparse attention where topk is its config's index_topk. The indexers' parameters
    are the model's, float32 at least while attached, and get the gradients of their loss alone: leave them out of the
    optimizer group of the model's other parameters.

    Args:
        dense: what `attach(model, indexers="own")` returned for all layers. It is removed.
        topk: K, 1 or more.

    Raises:
        ValueError: another topk or target, an indexer left out, or sequence and heads shared out.
    """
    model, attentions, parallel = dense.model, dict(dense.found.callers), dense.parallel
    wide = [parameter.detach() for parameter in dense.indexers.parameters()]  # remove() rounds to the model's dtype
    dense.remove()
    if parallel.cp * parallel.tp > 1:
        raise ValueError(
            f'attach: with topk and indexers="own" the model must be whole in one process, got cp={parallel.cp}, '
            f"tp={parallel.tp}; leave topk or parallel out"
        )
    check_sparse(dense, topk)
    if left_out := [layer for layer in indexer_sources(attentions) if layer not in dense.sources]:
        raise ValueError(
            'attach: with topk and indexers="own", every layer that an indexer serves must be chosen, since the model '
            f"attends sparsely there, got none for layers {left_out[:5]}; leave layers or topk out"
        )
    own = getattr(model.config.get_text_config(), "index_topk", None)
    if own is not None and own != topk:
        warnings.warn(
            f"attach: topk = {topk} is not the model's index_topk = {own}, by which Transformers and servers select; "
            "set model.config's too, if the model is to be saved so",
            stacklevel=3,
        )
    handle = OwnSparseHandle(dense, topk)
    taps = [
        OwnSparseTap(handle.attend_sparsely, layer, module, is_attached=layer in dense.sources)
        for layer, module in attentions.items()
    ]
    install_sparsely(handle, taps, OWN_SPARSE_ATTENTION)
    for undo in thaw_own(handle.indexers):
        handle.undo_with(undo)
    for parameter, value in zip(handle.indexers.parameters(), wide, strict=True):
        parameter.data.copy_(value)
    return handle


def make_sparse(dense: IndexerHandle, topk: int) -> SparseHandle:
    """`sparse_handle` of fresh indexers, `own_sparse_handle` of a model's own."""
    return own_sparse_handle(dense, topk) if dense.trains_own else sparse_handle(dense, topk)


class NoMask:
    """In the place of a mask, of which these models take a part for their indexer; SparseForward has read the mask."""

    def __getitem__(self, part: Any) -> NoMask:
        return self


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The registered attention function."""
    mask = None if isinstance(attention_mask, NoMask) else attention_mask
    return sparse_attention_function(module, query, key, value, mask, **kwargs)


def _no_mask(*args: Any, **kwargs: Any) -> NoMask:
    """The registered mask function."""
    return NoMask()


AttentionInterface.register(OWN_SPARSE_ATTENTION, uncompiled(attention))
AttentionMaskInterface.register(OWN_SPARSE_ATTENTION, _no_mask)
