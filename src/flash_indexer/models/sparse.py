"""DSA on a loaded Transformers model: attached layers attend to the keys that their indexers select.

In training the indexers' loss rides on the backward of the attention, which forms the probabilities anyway; in a model
that is frozen it goes backward inside the forward, as in the warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flash_indexer.models.absorbed import (
    EXPAND,
    Absorbed,
    absorbed,
    absorbed_in_runs,
    absorbed_query,
    expanded_output,
    is_absorbable,
    keep_latents,
    needs_runs,
)
from flash_indexer.models.capture import AttentionForm
from flash_indexer.models.families import FAMILIES, call_arguments, check_call
from flash_indexer.models.handle import IndexerHandle
from flash_indexer.models.hooks import TAP, uncompiled
from flash_indexer.models.index_cache import add_index_keys
from flash_indexer.models.install import switch_attention
from flash_indexer.models.oracle import attend_to_oracle_keys
from flash_indexer.models.packing import at_least_float32
from flash_indexer.models.shared_indexers import LayerLoss
from flash_indexer.models.sparse_checks import check_fresh, check_learns, check_sparse
from flash_indexer.models.sparse_dense import attend_densely
from flash_indexer.models.sparse_forward import SparseForward
from flash_indexer.models.sparse_hooks import FORWARD, SPARSE_ATTENTION, SPARSE_TAP, SparseTap
from flash_indexer.ops import Selection, SparseSettings, dsa_attention, select_keys, sparse_attention, sparse_indexer_kl
from flash_indexer.parallel.heads import all_heads, own_heads, shared_dsa_attention

__all__ = ["SparseHandle", "sparse_handle"]

Leaves = tuple[Tensor, Tensor, Tensor]
"""index_q, index_k and index_weights."""


class SparseHandle(IndexerHandle):
    """Indexers that select what their layers attend to, in forward, training and generation. See `sparse_handle`.

    Attributes:
        topk: K, keys that a query attends to. always: so many first and last keys are selected whatever their score.
        token_weight: weight of every token's KL in the indexers' loss; None means 1/T of each forward, T over all
            processes that share the sequence.
        kl_scale: a tensor of no dimension by which the indexers' loss is multiplied; None means 1.
        deterministic: the same gradients to the bit every time. False lets MLA's backward on Hopper GPUs add the keys'
            gradients in any order, which takes less time.
        keys: "indexer", or "oracle": layers attend to the `topk` keys of largest attention, an indexer's bound, and the
            indexers learn on these. In one process, without sinks, not of a model's own.
        on_selection: called with each layer's index and selection in forwards without gradients; None for none.
    """

    def __init__(self, dense: IndexerHandle, topk: int) -> None:
        vars(self).update(vars(dense))
        self.topk, self.always = topk, (0, 0)
        self.kl_scale: Tensor | None = None
        self.deterministic = True
        self.keys = "indexer"
        self.on_selection: Callable[[int, Selection], None] | None = None
        self._undo = []
        self._last: tuple[dict[int, Tensor], dict[int, Tensor]] | None = None

    def losses(self) -> dict[int, LayerLoss]:
        """Each layer's mean KL over the selected keys in the last forward that learnt, NaN until its backward has run.

        The uniform prediction's is known where the model is frozen and whole in one process, and NaN elsewhere. With
        context parallelism the means are over this process's tokens.
        """
        if self._last is None:
            return {}
        found, known = self._last
        return {
            n: LayerLoss(kl.mean(), known[n].mean() if n in known else kl.new_tensor(torch.nan))
            for n, kl in sorted(found.items())
        }

    def using(self, consumer: Any) -> NoReturn:
        """A sparse model has no captures.

        Raises:
            ValueError: always; says what to do.
        """
        raise ValueError("using: captures are those of dense attention; remove() the handle and attach without topk")

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the decoder runs: finds each query's keys; the layers get them as an argument."""
        inputs = call_arguments(module, args, kwargs)
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ValueError("attach: the decoder needs input_ids or inputs_embeds")
        check_call(module, inputs)
        forward = SparseForward(inputs, tokens, self.parallel)
        if inputs.get("position_ids") is None and forward.is_packed:
            inputs["position_ids"] = forward.positions
        return (), inputs | {FORWARD: forward}

    def attend_sparsely(
        self, tap: SparseTap, forward: SparseForward, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm
    ) -> Tensor:
        """One layer's attention: [B, H, L, D] against [B, G, S, D] to [B * L, H, V]."""
        if not tap.is_attached:
            return attend_densely(forward, q, k, v, form)
        scale, window = form.softmax_scale, form.window
        again = tap.layer in forward.seen  # in the backward of activation checkpointing
        if again and not forward.has_ended:
            raise ValueError(
                f"attach: layer {tap.layer} must run once in a forward, got a second run; models that run their layers "
                "several times can't be attached"
            )
        forward.seen.add(tap.layer)
        leaves = self._leaves(tap, forward, q)
        wide = (lambda x: x) if q.device.type == "cuda" else at_least_float32
        query, key, value = (wide(x.transpose(1, 2).flatten(0, 1)) for x in (q, k, v))
        heads = forward.parallel.group("tp") if tap.cache is None else None
        if heads is not None:
            query, key, value = (own_heads(x, heads) for x in (query, key, value))
        tensors: tuple[Tensor, Tensor, Tensor | None] = query, key, value
        latent, width, visible = None, None, forward.visible(k.shape[2], window)
        if is_absorbable(tap.module):  # key: latents, value: the rotated part of the keys
            latent, width = absorbed(tap.module, q.shape[1]), key.shape[-1]
            if heads is not None:
                latent = Absorbed(*(own_heads(x, heads, 0) for x in latent))
            key = torch.cat([key, value], -1)
        is_whole = forward.packing is None and heads is None
        in_backward = is_whole and self._learns(tap, forward) and torch.is_grad_enabled()
        in_runs = self.keys == "indexer" and in_backward and latent is not None and needs_runs(query, latent)
        if latent is not None and not in_runs:
            latent = latent.to(query.dtype)
            tensors = absorbed_query(query, latent.w_k), key, None
        if self.keys == "oracle":
            reports = not again and tap.cache is None
            out, kl, selection = self._attend_to_largest(forward, tensors, leaves, visible, form, width, reports)
            if self.on_selection is not None and not torch.is_grad_enabled():
                self.on_selection(tap.layer, selection)
        elif not is_whole:
            out, kl = self._attend_in_part(tap, forward, tensors, leaves, visible, scale, width, again)
        elif in_backward:
            kl = None if again else leaves[2].new_full((len(query),), torch.nan)
            if latent is not None and in_runs:
                out, latent = self._learn_in_runs(latent, query, key, leaves, visible, form, kl), None
            else:
                weight = self._token_weights(leaves[2], query)
                out = self._learn_in_backward(tensors, leaves, visible, form, width, kl, weight)
        else:
            selection = select_keys(
                *leaves, key_start=visible[0], key_end=visible[1], topk=self.topk, always=self.always
            )
            if self.on_selection is not None:
                self.on_selection(tap.layer, selection)
            out, lse = sparse_attention(
                *tensors, selection, softmax_scale=scale, value_dim=width, sinks=form.sinks,
                deterministic=self.deterministic,
            )  # fmt: skip
            kl = None
            if tap.cache is None and not torch.is_grad_enabled():
                kl = self._learn(tap, forward, (tensors[0], key), leaves, selection, scale, lse)
        if kl is not None:
            forward.kl[tap.layer], self._last = kl, (forward.kl, forward.uniform_kl)
        out = out if latent is None else expanded_output(out, latent.w_v, latent.b_v)
        return (out if heads is None else all_heads(out, heads)).to(q.dtype)

    def _learns(self, tap: SparseTap, forward: SparseForward) -> bool:
        """Whether the indexers get gradients: generation, which has a cache and no gradients, never trains them."""
        return self.indexers.training and forward.past == 0 and (torch.is_grad_enabled() or tap.cache is None)

    def _learn_in_backward(
        self,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        leaves: Leaves,
        visible: tuple[Tensor, Tensor],
        form: AttentionForm,
        width: int | None,
        kl: Tensor | None,
        weight: Tensor,
    ) -> Tensor:
        """The attention's output, whose backward brings the indexer's gradients with it and writes to `kl`."""
        q, k, v = tensors
        return dsa_attention(
            q, k, v, *leaves, softmax_scale=form.softmax_scale, key_start=visible[0], key_end=visible[1],
            topk=self.topk, value_dim=width, sinks=form.sinks, always=self.always,
            token_weight=weight, kl="backward", kl_scale=self.kl_scale, kl_out=kl, deterministic=self.deterministic,
        ).out  # fmt: skip

    def _learn_in_runs(
        self,
        latent: Absorbed,
        q: Tensor,
        k: Tensor,
        leaves: Leaves,
        visible: tuple[Tensor, Tensor],
        form: AttentionForm,
        kl: Tensor | None,
    ) -> Tensor:
        """The same of an MLA layer, absorbed, a run of queries at a time: [T, H, V]. What they select is kept."""
        weight, (start, end) = self._token_weights(leaves[2], q), visible
        selection = select_keys(*leaves, key_start=start, key_end=end, topk=self.topk, always=self.always)

        settings = SparseSettings(
            form.softmax_scale, start, end, self.topk, latent.w_v.shape[1], self.always, weight, "backward",
            self.kl_scale, kl, self.deterministic, True, selection=selection,
        )  # fmt: skip
        return absorbed_in_runs(latent, q, k, leaves, settings, form.sinks)

    def _attend_to_largest(
        self,
        forward: SparseForward,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        leaves: Leaves,
        visible: tuple[Tensor, Tensor],
        form: AttentionForm,
        width: int | None,
        reports: bool,
    ) -> tuple[Tensor, Tensor | None, Selection]:
        """The output over the keys of largest attention, with the KL [T] of the indexer there, if the layer reports."""
        if forward.packing is not None or self.parallel.tp > 1 or form.sinks is not None or self.trains_own:
            raise ValueError(
                'attach: keys="oracle" must run in one process, without sinks, of fresh indexers, got '
                f"cp={self.parallel.cp}, tp={self.parallel.tp}, sinks {'' if form.sinks is None else 'not '}None, "
                f"indexers {'own' if self.trains_own else 'fresh'}; leave it out"
            )
        weight = self._token_weights(leaves[2], tensors[0])
        out, kl, selection = attend_to_oracle_keys(
            tensors, leaves, visible, self.topk, softmax_scale=form.softmax_scale, value_dim=width,
            token_weight=weight, kl_scale=self.kl_scale,
            kl_out=torch.full_like(weight, torch.nan) if reports and torch.is_grad_enabled() else None,
            deterministic=self.deterministic,
        )  # fmt: skip
        return out, kl if reports else None, selection

    def _attend_in_part(
        self,
        tap: SparseTap,
        forward: SparseForward,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        leaves: Leaves,
        visible: tuple[Tensor, Tensor],
        scale: float,
        width: int | None,
        again: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The output of this process's tokens and heads, and the tokens' KL, over the keys of all processes."""
        learns, with_gradients = self._learns(tap, forward), torch.is_grad_enabled()
        weights = self._token_weights(leaves[2], tensors[0])
        now = not with_gradients and tap.cache is None and forward.past == 0  # also where nothing learns
        kl = leaves[2].new_full(weights.shape, torch.nan) if learns and with_gradients and not again else None
        with torch.set_grad_enabled(with_gradients or now):
            made = shared_dsa_attention(
                forward.parallel, *tensors, *(leaves if learns else (x.detach() for x in leaves)),
                softmax_scale=scale, key_start=visible[0], key_end=visible[1], topk=self.topk,
                value_dim=width, always=self.always, token_weight=weights,
                kl="forward" if now else "backward", kl_scale=None if now else self.kl_scale, kl_out=kl,
                deterministic=self.deterministic,
            )  # fmt: skip
            if made.loss is not None and made.loss.requires_grad:
                loss = made.loss if self.kl_scale is None else made.loss * self.kl_scale
                loss.backward()  # type: ignore[no-untyped-call]
        if not with_gradients and self.on_selection is not None:
            self.on_selection(tap.layer, made.selection)
        return made.out, made.kl if now else kl

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
        """The KL [T] of a model that is frozen, and in train() mode its backward, at once."""
        weight = self._token_weights(leaves[2], qk[0])
        with torch.enable_grad():
            loss, kl, entropy = sparse_indexer_kl(
                *qk, *leaves, selection, softmax_scale=scale, lse=lse, token_weight=weight,
                deterministic=self.deterministic,
            )  # fmt: skip
            if loss.requires_grad:
                loss = loss if self.kl_scale is None else loss * self.kl_scale
                loss.backward()  # type: ignore[no-untyped-call]
        forward.uniform_kl[tap.layer] = selection.count.clamp_min(1).to(kl.dtype).log() - entropy
        return kl

    def _token_weights(self, index_weights: Tensor, q: Tensor) -> Tensor:
        each = 1 / (len(q) * self.parallel.cp) if self.token_weight is None else self.token_weight
        return index_weights.new_full((len(q),), each)

    def _leaves(self, tap: SparseTap, forward: SparseForward, q: Tensor) -> Leaves:
        """index_q and index_weights of the new tokens, index_k of all keys of their rows."""
        if forward.has_gradients and not torch.is_grad_enabled():
            raise ValueError(
                "attach: activation checkpointing must be without reentrance, got a layer that runs without gradients "
                "in a forward that has them; pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if q.device.type == "cuda" and q.dtype != torch.bfloat16:
            raise ValueError(
                f"attach: on CUDA attention must be in bfloat16, got {q.dtype}; load the model with that dtype or "
                "call it under torch.autocast"
            )
        wide = (lambda x: x.to(q.dtype)) if q.device.type == "cuda" else at_least_float32
        if (learns := self._learns(tap, forward)) and not torch.is_grad_enabled():
            check_learns()
        with torch.set_grad_enabled(learns):
            index_q, index_k, weights = tap.operands(self.indexers[str(tap.layer)], wide)
        if tap.cache is not None:
            rows = torch.unflatten(index_k, 0, (forward.rows, -1))
            index_k = add_index_keys(tap.cache, tap.layer, rows).flatten(0, 1)
        return index_q, index_k, weights

    def end_sparsely(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder: every attached layer must have passed through the attention function."""
        forward: SparseForward = kwargs[FORWARD]
        forward.has_ended = True
        if missing := [layer for layer in self.layers if layer not in forward.seen]:
            raise RuntimeError(
                f"attach: layers {missing[:5]} did not call the registered attention function; "
                f"attachable are {FAMILIES}"
            )


def sparse_handle(dense: IndexerHandle, topk: int) -> SparseHandle:
    """Makes the attached layers of a model attend to the `topk` keys that their indexers rank highest.

        S_t      = the topk visible keys of largest i[t,s]
        out[t,h] = sum_{s in S_t} softmax over S_t of (scale * q[t,h]·k[s,g(h)]) v[s,g(h)]

    MLA runs absorbed, over the latents that it caches. Layers without an indexer stay dense. The model's parameters
    require gradients as before it was attached.

    Training: call the model in any mode with use_cache=False and run the backward of its own loss. Where the indexers
    are in train() mode they get the gradients of kl_scale * token_weight * sum of KL over the selected keys, which are
    formed in that backward; the model gets none of these. Under torch.no_grad() the indexers alone learn, inside the
    forward. Batches are packed as for `attach`. Activation checkpointing: without reentrance.

    Generation: index_k is cached with k and v in a DynamicCache; batches may be padded on the left.

    Context parallelism: the model is given this process's part of input_ids and position_ids, as for `attach`, every
    process runs forward and backward, and the gradients of the model's and the indexers' parameters are each process's
    part of one sum. Not for generation. Tensor parallelism: each process has the whole model, the same tokens and the
    same gradients, and attends with its heads; in a sum over processes each counts 1/tp.

    Args:
        dense: what `attach` returned, target "mean". It is removed.
        topk: K, 1 or more; at or above the model's context nothing is selected away, which warns.

    Raises:
        ValueError: another topk, target or kind of indexer, heads that tp doesn't divide or `shard_model` shared out.

    Source: DeepSeek-V3.2-Exp technical report (2025), section 2.1.
    """
    modules: list[nn.Module] = [module for module in dense.decoder.modules() if TAP in module.__dict__]
    taps = [module.__dict__[TAP] for module in modules]
    dense.remove()
    check_fresh(dense)
    check_sparse(dense, topk)
    handle = SparseHandle(dense, topk)
    attached = [tap.layer in handle.layers for tap in taps]
    install_sparsely(handle, [
        SparseTap(handle.attend_sparsely, tap.layer, module, is_attached=one, rotary=tap.rotary if one else None)
        for module, tap, one in zip(modules, taps, attached, strict=True)
    ])  # fmt: skip
    return handle


def install_sparsely(handle: SparseHandle, taps: Sequence[SparseTap], function: str = SPARSE_ATTENTION) -> None:
    """Adds the hooks to the handle's model and switches to the registered `function`; records how to undo each."""
    for tap in taps:
        _install_layer(handle, tap)
    model, decoder = handle.model, handle.decoder
    handle.undo_with(switch_attention(model, decoder, function))
    handle.undo_with(decoder.register_forward_pre_hook(uncompiled(handle.begin), with_kwargs=True).remove)
    handle.undo_with(decoder.register_forward_hook(uncompiled(handle.end_sparsely), with_kwargs=True).remove)


def _install_layer(handle: SparseHandle, tap: SparseTap) -> None:
    module = tap.module
    module.__dict__[SPARSE_TAP] = tap
    handle.undo_with(partial(module.__dict__.pop, SPARSE_TAP, None))
    if not tap.is_attached:
        return
    for undo in tap.install():
        handle.undo_with(undo)
    if is_absorbable(module):
        module.__dict__[EXPAND] = keep_latents
        handle.undo_with(partial(module.__dict__.pop, EXPAND, None))
