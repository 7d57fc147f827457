"""Attaches lightning indexers to a loaded Transformers model, and takes them off again.

The model's attention is replaced by a registered attention function that computes the same output and the logsumexp.
While it runs, each attached layer's queries, keys and index operands are handed to a consumer: by default the warm-up
loss, whose backward runs at once, inside the forward, so that one layer's scores live at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flash_indexer.indexer import LightningIndexer
from flash_indexer.models.families import (
    FAMILIES,
    check_rope,
    chosen_layers,
    find_decoder,
    is_attachable,
    resized_rotary,
)
from flash_indexer.models.packing import Packing, at_least_float32, batch_positions, causal_attention, packing
from flash_indexer.models.teacher import layer_kl
from flash_indexer.parallel.mesh import Parallel

_NAME = "lightning_indexer_teacher"  # Transformers takes any name with "flash" in it for FlashAttention
_PACKED = "batches are packed, not padded or masked; concatenate documents and restart position_ids at 0 for each"


@dataclass(frozen=True)
class LayerCapture:
    """One attached layer's attention in one forward, batch rows flattened into T tokens (S = T).

    Context parallelism: q, k, v and the index tensors are this process's tokens, key_start and key_end count all keys.
    Tensor parallelism: q, k, v, lse and out are this process's heads.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    out: Tensor
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    softmax_scale: float
    key_start: Tensor
    key_end: Tensor


Consumer = Callable[[LayerCapture], Tensor | None]


class LayerLoss(NamedTuple):
    """Means over the tokens of the last forward, nats."""

    kl: Tensor
    uniform_kl: Tensor


class _Tap:
    """What an attached layer's hooks have seen in the forward under way."""

    def __init__(self, handle: IndexerHandle, layer: int) -> None:
        self.handle, self.layer = handle, layer
        self.hidden: Tensor | None = None
        self.q_residual: Tensor | None = None
        self.rope: tuple[Tensor, Tensor] | None = None

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        if self.layer in self.handle.layers:
            return self.handle._capture(self, q, k, v, scale, window)
        return self.handle._attend(q, k, v, scale, window)[0]


class IndexerHandle:
    """Indexers attached to a model. `remove()` leaves the model as it was, to the bit.

    Attributes:
        model: the model; its parameters do not require gradients while the indexers are attached.
        indexers: one LightningIndexer per attached layer, keyed by str(layer). In train() mode (the default) a
            forward of the model adds each layer's gradients; in eval() mode it only computes the losses.
        layers: attached layers, ascending. target: see `flash_indexer.indexer_kl`.
        token_weight: weight of every token's KL in the loss; None means 1/T of each forward. Training sets it to
            1 / (tokens of the whole optimizer step over all ranks).
        parallel: how sequence and heads are shared out over processes.
        observer: called with each layer's capture before the default loss, for logging; None for none.
    """

    def __init__(self, model: PreTrainedModel, indexers: nn.ModuleDict, target: str, parallel: Parallel) -> None:
        self.model = model
        self.decoder: Any = find_decoder(model)
        self.indexers = indexers
        self.layers = tuple(int(name) for name in indexers)
        self.target = target
        self.parallel = parallel
        self.token_weight: float | None = None
        self.observer: Callable[[LayerCapture], None] | None = None
        self._losses: dict[int, LayerLoss] = {}
        self._consumer: Consumer | None = None
        self._packing: Packing | None = None
        self._undo: list[Callable[[], object]] = []
        self._seen: set[int] = set()

    def losses(self) -> dict[int, LayerLoss]:
        """Each attached layer's mean KL, and the uniform prediction's, in the last forward."""
        return dict(self._losses)

    @contextmanager
    def using(self, consumer: Consumer) -> Iterator[IndexerHandle]:
        """Hands captures to `consumer` instead of the loss; a tensor [T, H, V] it returns replaces the output.

        The indexers then run without gradients.

        Raises:
            ValueError: sequence or heads are shared out over processes, so that no capture is whole.
        """
        if self.parallel.cp * self.parallel.tp > 1:
            raise ValueError(
                "using: captures must be whole, got a model attached with context or tensor parallelism; attach it in "
                "one process to evaluate"
            )
        before, self._consumer = self._consumer, consumer
        try:
            yield self
        finally:
            self._consumer = before

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters under DeepSeek-V3.2's checkpoint names: model.layers.N.self_attn.indexer.*"""
        return {
            f"model.layers.{layer}.self_attn.indexer.{name}": value
            for layer in self.layers
            for name, value in self.indexers[str(layer)].state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads what `state_dict` gave. Raises ValueError on missing, unknown or misshapen entries."""
        own = self.state_dict()
        if set(own) != set(state):
            missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
            raise ValueError(
                f"load_state_dict: state must have the attached layers' parameters; missing {missing[:3]}, "
                f"unknown {unknown[:3]}; attach with the layers and sizes it was saved with"
            )
        with torch.no_grad():
            for name, value in own.items():
                if value.shape != state[name].shape:
                    raise ValueError(
                        f"load_state_dict: {name} must be {list(value.shape)}, got {list(state[name].shape)}; "
                        "attach with the sizes it was saved with"
                    )
                value.copy_(state[name])

    def remove(self) -> None:
        """Takes hooks and attention function off again. The indexers stay usable; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs: finds the documents from position_ids."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ValueError("attach: the decoder needs input_ids or inputs_embeds")
        positions = batch_positions(kwargs.get("position_ids"), tokens, self.parallel)
        self._packing = packing(positions, self.parallel)
        self._losses, self._seen = {}, set()

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the decoder: every attached layer must have passed through the attention function."""
        missing = [layer for layer in self.layers if layer not in self._seen]
        if missing:
            raise RuntimeError(
                f"attach: layers {missing[:5]} did not call the registered attention function; "
                f"attachable are {FAMILIES}"
            )
        self._packing = None

    def _capture(self, tap: _Tap, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Runs one attached layer's attention, then its indexer and the consumer."""
        assert self._packing is not None and tap.hidden is not None and tap.rope is not None
        if q.device.type == "cuda" and q.dtype != torch.bfloat16:
            raise ValueError(
                f"attach: on CUDA the model must be bfloat16, got {q.dtype}; load it with that dtype (--dtype bfloat16)"
            )
        out, lse = self._attend(q, k, v, scale, window)
        key_start, key_end = self._packing.visible(window)
        wide = (lambda x: x) if q.device.type == "cuda" else at_least_float32
        hidden = wide(tap.hidden.flatten(0, -2))
        residual = None if tap.q_residual is None else wide(tap.q_residual.flatten(0, -2))
        cos, sin = (x.expand(*tap.hidden.shape[:-1], -1).flatten(0, -2) for x in tap.rope)
        with torch.set_grad_enabled(self._consumer is None and self.indexers.training):
            index_q, index_k, index_weights = self.indexers[str(tap.layer)](hidden, residual, cos, sin)
        tap.hidden = tap.q_residual = tap.rope = None
        capture = LayerCapture(
            tap.layer, wide(q), wide(k), wide(v), lse.to(index_weights.dtype), out,
            index_q, index_k, index_weights, scale, key_start, key_end,
        )  # fmt: skip
        self._seen.add(tap.layer)
        if self._consumer is None:
            self._loss(capture)
            return out
        replaced = self._consumer(capture)
        return out if replaced is None else replaced.to(out.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
        assert self._packing is not None
        return causal_attention(q, k, v, self._packing, softmax_scale=scale, window=window, parallel=self.parallel)

    def _loss(self, capture: LayerCapture) -> None:
        """The default consumer: the layer's KL and, in train() mode, its backward."""
        if self.observer is not None:
            self.observer(capture)
        T = capture.q.shape[0]
        each = 1 / (T * self.parallel.cp) if self.token_weight is None else self.token_weight
        weight = capture.index_weights.new_full((T,), each)
        with torch.enable_grad():
            loss, kl, entropy = layer_kl(capture, target=self.target, token_weight=weight, parallel=self.parallel)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        visible = (capture.key_end - capture.key_start).to(kl.dtype).log()
        uniform = visible.view(-1, *[1] * (kl.ndim - 1)) - entropy
        self._losses[capture.layer] = LayerLoss(kl.mean(), uniform.mean())


def attach(
    model: PreTrainedModel,
    *,
    num_heads: int = 8,
    head_dim: int = 64,
    rope_dim: int | None = None,
    target: str = "mean",
    layers: Sequence[int] | None = None,
    parallel: Parallel | None = None,
) -> IndexerHandle:
    """Gives every layer of a dense model a fresh lightning indexer that learns from the layer's own attention.

    MLA models with q-LoRA: wq_b reads the normed query residual, rope is the model's own (half-split, on
    qk_rope_head_dim dims, as in DeepSeek-V3.2). Elsewhere wq_b reads the hidden state and rope comes from the model's
    rope settings with rope_dim dims.

    Batches are packed: no padding; documents restart position_ids at 0. Sliding windows are respected.

    Args:
        model: a loaded causal language model. Its parameters stop requiring gradients until `remove()`.
        num_heads: I. head_dim: E. rope_dim: None means min(32, head_dim), for MLA qk_rope_head_dim.
        target: see `flash_indexer.indexer_kl`. layers: indices of the layers to attach; None means all.
        parallel: how sequence and heads are shared out over processes. With cp > 1 the model is given this process's
            part of input_ids and position_ids (`context_positions` of the flattened batch); with tp > 1 it is sharded.

    Raises:
        ValueError: a family or rope that can't be attached, layers that don't exist, or sizes that don't fit.
    """
    decoder = find_decoder(model)
    blocks = getattr(decoder, "layers", None)
    attentions = [getattr(block, "self_attn", None) for block in blocks] if blocks is not None else []
    if not attentions or not all(is_attachable(module) for module in attentions) or not hasattr(decoder, "rotary_emb"):
        raise ValueError(f"attach: model must be one of the {FAMILIES}; got {type(model).__name__}")
    if any(hasattr(module, "indexer") for module in attentions):
        raise ValueError(f"attach: {type(model).__name__} has indexers of its own; attach to the dense model")
    if any("_flash_indexer" in module.__dict__ for module in attentions):
        raise ValueError("attach: the model has indexers attached already; call remove() on their handle first")
    chosen = chosen_layers(layers, len(attentions))

    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"attach: attention with softcap is not supported, got {type(model).__name__} with "
            f"attn_logit_softcapping={config.attn_logit_softcapping}; attachable are {FAMILIES}"
        )
    check_rope(config, 1 if parallel is None else parallel.cp)
    mla = hasattr(attentions[0], "kv_b_proj")
    rank = getattr(config, "q_lora_rank", None) if mla else None
    if mla:
        if rope_dim not in (None, config.qk_rope_head_dim):
            raise ValueError(f"attach: rope_dim must be qk_rope_head_dim = {config.qk_rope_head_dim}, got {rope_dim}")
        rope_dim = config.qk_rope_head_dim
    rope_dim = min(32, head_dim) if rope_dim is None else rope_dim
    if target not in ("mean", "per_head", "sum_logits"):
        raise ValueError(f'attach: target must be "mean", "per_head" or "sum_logits", got {target!r}')
    if target == "per_head" and parallel is not None and parallel.tp > 1:
        raise ValueError(f'attach: target="per_head" has no sum over heads to share out, got tp={parallel.tp}; use cp')
    if target == "per_head" and num_heads != config.num_attention_heads:
        raise ValueError(
            f'attach: target="per_head" needs num_heads = {config.num_attention_heads}, the model\'s, got {num_heads}'
        )
    device = next(model.parameters()).device
    indexers = nn.ModuleDict()
    for layer in chosen:
        indexers[str(layer)] = LightningIndexer(
            config.hidden_size, num_heads=num_heads, head_dim=head_dim, q_lora_rank=rank,
            rope_dim=rope_dim, rope_interleaved=False,
        ).to(device)  # fmt: skip
    handle = IndexerHandle(model, indexers, target, parallel or Parallel())
    rotary = None if mla else resized_rotary(decoder, config, rope_dim).to(device)
    _install(handle, decoder, attentions, rotary)
    return handle


def _install(handle: IndexerHandle, decoder: Any, attentions: list[Any], rotary: nn.Module | None) -> None:
    """Freezes the model, adds the hooks, switches the attention function; records how to undo each."""
    model, undo = handle.model, handle._undo
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            undo.append(partial(parameter.requires_grad_, True))
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    undo.append(lambda: model.set_attn_implementation(before))
    undo.append(decoder.register_forward_pre_hook(handle._begin, with_kwargs=True).remove)
    undo.append(decoder.register_forward_hook(handle._end).remove)
    for layer, module in enumerate(attentions):
        tap = _Tap(handle, layer)
        module.__dict__["_flash_indexer"] = tap
        undo.append(partial(module.__dict__.pop, "_flash_indexer", None))
        if layer not in handle.layers:
            continue
        hook = _inputs_hook(tap, rotary)
        undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if getattr(module, "q_a_layernorm", None) is not None:
            undo.append(module.q_a_layernorm.register_forward_hook(_residual_hook(tap)).remove)


def _inputs_hook(tap: _Tap, rotary: nn.Module | None) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if rotary is None:
            tap.rope = kwargs["position_embeddings"]
            if not isinstance(tap.rope, tuple) or len(tap.rope) != 2:
                raise ValueError(f"attach: rope must come as (cos, sin), got {type(tap.rope).__name__}; {FAMILIES}")
        else:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(tap.hidden.shape[1], device=tap.hidden.device)[None]
            tap.rope = rotary(tap.hidden, positions)

    return hook


def _residual_hook(tap: _Tap) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        tap.q_residual = output

    return hook


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function: query [B, H, L, D], key [B, G, L, D], value [B, G, L, V]."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attach: attention with {name} is not supported; attachable are {FAMILIES}")
    if kwargs.get("is_causal") is False:
        raise ValueError(f"attach: attention must be causal, got is_causal=False; attachable are {FAMILIES}")
    if attention_mask is not None:  # one of four dimensions, which no mask function saw
        raise ValueError(f"attach: attention_mask must be [B, L], got {list(attention_mask.shape)}; {_PACKED}")
    if dropout:
        raise ValueError(f"attach: attention dropout must be 0, got {dropout}; call model.eval()")
    B, _, L, _ = query.shape
    if key.shape[2] != L:
        raise ValueError(
            f"attach: a forward must see whole sequences, got {L} queries on {key.shape[2]} keys; "
            "pass use_cache=False, or remove() the indexers before generating"
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
    tap: _Tap | None = module.__dict__.get("_flash_indexer")
    if tap is None:
        raise ValueError(f"attach: {type(module).__name__} is not of the attached decoder; attachable are {FAMILIES}")
    out = tap.run(q, k, v, scale, sliding_window)
    return torch.unflatten(out, 0, (B, L)), None


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """The registered mask function: intervals take the mask's place, so a padded batch can't be represented."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(f"attach: attention_mask must be all ones or absent: {_PACKED}")


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _no_mask)
