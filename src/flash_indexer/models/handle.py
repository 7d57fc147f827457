"""The handle of attached indexers: runs each layer's attention, its indexer, and what consumes the two."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flash_indexer.models.capture import AttentionForm, LayerCapture
from flash_indexer.models.documents import document_positions
from flash_indexer.models.families import FAMILIES, call_arguments, check_call, find_decoder, parameter_names
from flash_indexer.models.hooks import TAP, LayerTap
from flash_indexer.models.layer_mask import LayerMask
from flash_indexer.models.layers import DecoderLayers
from flash_indexer.models.own_indexers import OwnIndexer
from flash_indexer.models.packing import Packing, at_least_float32, causal_attention, packing
from flash_indexer.models.rope import Ropes
from flash_indexer.models.shared_indexers import LayerLoss, Operands, SharedOperands
from flash_indexer.models.teacher import layer_kl
from flash_indexer.models.verification import Verification
from flash_indexer.ops.worklists import to_device
from flash_indexer.parallel.mesh import Parallel

Consumer = Callable[[LayerCapture], Tensor | None]


class IndexerHandle:
    """Indexers attached to a model. `remove()` leaves the model as it was, to the bit.

    Attributes:
        model: the model; its parameters do not require gradients while the indexers are attached.
        indexers: one LightningIndexer per attached layer, keyed by str(layer). In train() mode (the default) a
            forward of the model adds each layer's gradients; in eval() mode it only computes the losses.
        layers: layers that have an indexer, ascending. target: see `flash_indexer.indexer_kl`.
        sources: of each layer that an indexer serves, the layer that has it: itself, but for shared indexers.
        teachers: "shared": an indexer learns from all layers that it serves; "own": from the one that has it.
        token_weight: weight of every token's KL in the loss; None means 1/T of each forward. Training sets it to
            1 / (tokens of the whole optimizer step over all ranks).
        queries: int64 [R], ascending: the tokens of the next forwards, of this process's flattened batch, whose KL is
            computed; the indexers' queries are formed of these alone, the others cost nothing. None means all. Losses
            are means over them, and without a token_weight so is what is trained on. Where they are drawn so that
            each token is among them with probability f, 1 / (f · tokens) as token_weight makes the loss an unbiased
            estimate of that of all tokens.
        parallel: how sequence and heads are shared out over processes.
        attentions: the attention module of each layer that an indexer serves. description: which layers have
            indexers, and why others have none, in one line.
        index_dtype, teacher_dtype: arithmetic of the loss, see `flash_indexer.indexer_kl`.
        observer: called with each layer's capture before the default loss, for logging; None for none.
        tokenizer_fingerprint: of the tokenizer whose tokens the indexers learn on, as
            `flash_indexer.models.load.tokenizer_fingerprint` gives it; written with the indexers. None: not known.
        ropes: cos and sin of the indexers' rotary embeddings in the forward under way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        indexers: nn.ModuleDict,
        target: str,
        parallel: Parallel,
        *,
        found: DecoderLayers,
        index_dtype: str | None = None,
        teacher_dtype: str | None = None,
        sources: Mapping[int, int] | None = None,
        teachers: str = "shared",
    ) -> None:
        self.model = model
        self.found = found
        self.decoder: Any = find_decoder(model)
        self.indexers = indexers
        self.layers = tuple(int(name) for name in indexers)
        self.sources = {layer: layer for layer in self.layers} if sources is None else dict(sources)
        self.teachers = teachers
        self.attentions = {layer: found.attentions[layer] for layer in self.sources}
        self.description = found.described(self.layers)
        self.target = target
        self.parallel = parallel
        self.index_dtype = index_dtype
        self.teacher_dtype = teacher_dtype
        self.ropes = Ropes()
        self.token_weight: float | None = None
        self.queries: Tensor | None = None
        self.observer: Callable[[LayerCapture], None] | None = None
        self.tokenizer_fingerprint: str | None = None
        self._shared: dict[int, SharedOperands] = {}
        self._losses: dict[int, LayerLoss] = {}
        self._consumer: Consumer | None = None
        self._packing: Packing | None = None
        self._positions: Tensor | None = None
        self._verification = Verification()
        self._weight: dict[int, Tensor] = {}
        self._log_visible: dict[tuple[Tensor, Tensor], Tensor] = {}
        self._seen: set[int] = set()
        self._runner: threading.Thread | None = None
        self._lock = threading.Lock()
        self._undo: list[Callable[[], object]] = []

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "attach: a handle, and the model while its indexers are attached, can't be copied or pickled: their hooks "
            "would go on feeding the indexers of the original; call remove() first, copy the model, attach to the "
            "copy, and load_state_dict(handle.state_dict())"
        )

    @property
    def trains_own(self) -> bool:
        """Whether the indexers are those that the model has of its own."""
        return any(isinstance(module, OwnIndexer) for module in self.indexers.values())

    def losses(self) -> dict[int, LayerLoss]:
        """The mean KL of each indexer, and the uniform prediction's, in the last forward, over its `queries`.

        By the layer that has the indexer; of several teachers the mean.
        """
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

    def undo_with(self, action: Callable[[], object]) -> None:
        """`remove` calls `action`, the last one first."""
        self._undo.append(action)

    def begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the decoder runs: checks that it may, and finds the documents, whose positions it then gets."""
        with self._lock:
            if self._runner not in (None, threading.current_thread()) and self._runner.is_alive():
                raise RuntimeError(
                    f"attach: one forward at a time must run on an attached model, got a second in thread "
                    f"{threading.current_thread().name!r} while {self._runner.name!r} is in its own; let it wait, or "
                    "load and attach a model for each thread"
                )
            self._runner = threading.current_thread()
        inputs = call_arguments(module, args, kwargs)
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ValueError("attach: the decoder needs input_ids or inputs_embeds")
        if torch.is_inference_mode_enabled() and self.indexers.training and self._consumer is None:
            raise ValueError(
                "attach: the forward must run outside of torch.inference_mode() while the indexers train, since no "
                "gradient exists inside it; use torch.no_grad() around the model, or handle.indexers.eval() to compute "
                "losses alone"
            )
        check_call(module, inputs)
        positions = document_positions(inputs, tokens, self.parallel)
        self._packing, self._positions = packing(positions, self.parallel, self._checked_queries(positions)), positions
        self._packing.read_ahead()
        self._losses, self._seen, self._shared = {}, set(), {}
        self._verification.begin(positions)
        several = bool((positions.diff(dim=1) != 1).any())
        if several and "position_ids" not in parameter_names(module):
            raise ValueError(
                f"attach: rows must be one document each for {type(module).__name__}, which takes no position_ids, "
                "got a row of several"
            )
        changed = dict[str, Any]()
        if isinstance(inputs.get("attention_mask"), Tensor):  # beside which Transformers' masks look at no position_ids
            changed["attention_mask"] = None
        if several and inputs.get("position_ids") is None:
            changed["position_ids"] = positions
            self._verification.say_documents(
                "Transformers' eager and sdpa attention read documents from position_ids only"
            )
        return ((), inputs | changed) if changed else (args, kwargs)

    def release(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the decoder, also where it raised: another thread may run it now."""
        if self._runner is threading.current_thread():
            self._runner = self._packing = self._positions = None
            self._shared, self._weight, self._log_visible = {}, {}, {}
            self.ropes.forget()
            self._verification.end()

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the decoder: every attached layer must have passed through the attention function."""
        missing = [layer for layer in self.sources if layer not in self._seen]
        if missing:
            raise RuntimeError(
                f"attach: layers {missing[:5]} did not call the registered attention function; "
                f"attachable are {FAMILIES}"
            )
        self._verification.conclude()

    def attend(
        self, tap: LayerTap, q: Tensor, k: Tensor, v: Tensor, form: AttentionForm, mask: LayerMask | None
    ) -> Tensor:
        """Runs one layer's attention; where the layer is attached, its indexer and the consumer after it."""
        assert self._packing is not None and self._positions is not None
        if self._verification.replaying:
            return self._verification.attention(q, k, v, form)
        self._verification.check_mask(tap.layer, form, mask)
        if tap.layer not in self.sources:
            return causal_attention(q, k, v, self._packing, form, parallel=self.parallel)[0]
        if q.device.type == "cuda" and q.dtype != torch.bfloat16:
            raise ValueError(
                f"attach: on CUDA the model must be bfloat16, got {q.dtype}; load it with that dtype (--dtype bfloat16)"
            )
        if form.sinks is not None and self.teacher_dtype is not None:
            raise ValueError(
                f"attach: teacher_dtype must be None for attention with sinks, got {self.teacher_dtype!r}: the "
                "logsumexp of FP8 logits would leave the sinks out"
            )
        if form.sinks is not None and form.sinks.shape[0] != q.shape[1]:
            raise ValueError(
                f"attach: tp must be 1 for attention with sinks, got tp={self.parallel.tp}; use FSDP or cp"
            )
        if tap.layer in self._seen:
            raise ValueError(
                f"attach: layer {tap.layer} must run once in a forward, got a second run, of another hidden state that "
                "its indexer would serve too; models that run their layers several times can't be attached"
            )
        out, lse = causal_attention(q, k, v, self._packing, form, parallel=self.parallel)
        key_start, key_end = self._packing.visible(form.window, form.chunk, queries_only=True)
        queries = self._packing.queries
        wide = (lambda x: x.to(q.dtype)) if q.device.type == "cuda" else at_least_float32
        index_q, index_k, index_weights = self._operands(tap, wide, q.device)
        if queries is not None:
            q, lse = q[queries], lse[queries]
        capture = LayerCapture(
            tap.layer, wide(q), wide(k), wide(v), lse.to(index_weights.dtype), out,
            index_q, index_k, index_weights, form.softmax_scale, key_start, key_end, form.sinks, form.softcap,
        )  # fmt: skip
        self._seen.add(tap.layer)
        replaced = None
        if self._consumer is not None:
            replaced = self._consumer(capture)
        elif self.teachers == "shared" or tap.layer in self.layers:
            self._loss(capture)
        if tap.layer == max(self._served(source := self.sources[tap.layer])):
            del self._shared[source]
        return out if replaced is None else replaced.to(out.dtype)

    def _served(self, source: int) -> list[int]:
        """The layers that use the indexer of layer `source`."""
        return [layer for layer, other in self.sources.items() if other == source]

    def _operands(self, tap: LayerTap, wide: Callable[[Tensor], Tensor], device: torch.device) -> Operands:
        """The operands of the layer's indexer, made in this layer or in the earlier one that has it."""
        source = self.sources[tap.layer]
        if source == tap.layer:
            assert self._packing is not None and self._positions is not None
            with torch.set_grad_enabled(self._consumer is None and self.indexers.training):
                made = tap.operands(self.indexers[str(source)], wide, self._positions, self._packing.queries)
            teachers = len(self._served(source)) if self.teachers == "shared" else 1
            self._shared[source] = SharedOperands(made, teachers)
        return self._shared[source].for_layer(device)

    def verify(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a layer's attention module: whether it computes without the attachment what it does with it."""
        tap: LayerTap = module.__dict__[TAP]
        self._verification.replay(layer, module, call_arguments(module, args, kwargs), tap.replay_arguments)
        tap.forget()

    def _loss(self, capture: LayerCapture) -> None:
        """The default consumer: the layer's KL and, in train() mode, its backward."""
        if self.observer is not None:
            self.observer(capture)
        source = self.sources[capture.layer]
        shared = self._shared[source]
        weight = self._weights(capture, shared.teachers)
        with torch.enable_grad():
            loss, kl, entropy = layer_kl(
                capture, target=self.target, token_weight=weight, parallel=self.parallel,
                index_dtype=self.index_dtype, teacher_dtype=self.teacher_dtype,
            )  # fmt: skip
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        uniform = self._most_entropy(capture, kl.dtype).view(-1, *[1] * (kl.ndim - 1)) - entropy
        operands = capture.index_q, capture.index_k, capture.index_weights
        found = LayerLoss(*(x.mean() if x.numel() else x.sum() for x in (kl, uniform)))
        if (done := shared.add(operands, found)) is not None:
            self._losses[source] = done

    def _most_entropy(self, capture: LayerCapture, dtype: torch.dtype) -> Tensor:
        """The logarithm of how many keys each query sees, made once for all layers with the same intervals."""
        seen = capture.key_start, capture.key_end
        if (known := self._log_visible.get(seen)) is None or known.dtype != dtype:
            self._log_visible[seen] = known = (capture.key_end - capture.key_start).to(dtype).log()
        return known

    def _weights(self, capture: LayerCapture, teachers: int) -> Tensor:
        """token_weight / teachers for each query, one tensor for all such layers: the operators read it once."""
        like, known = capture.index_weights, self._weight.get(teachers)
        if known is None or (known.device, known.dtype) != (like.device, like.dtype):
            T = like.shape[0]
            each = 1 / (max(T, 1) * self.parallel.cp) if self.token_weight is None else self.token_weight
            self._weight[teachers] = known = like.detach().new_full((T,), each / teachers)
        return known

    def _checked_queries(self, positions: Tensor) -> Tensor | None:
        """`queries` on the device of the batch, whose T tokens have these positions; None for a consumer of all."""
        queries, T = self.queries, positions.numel()
        if queries is None or self._consumer is not None:
            return None
        if queries.ndim != 1 or queries.dtype != torch.int64 or queries.device.type != "cpu":
            raise ValueError(
                f"attach: handle.queries must be int64 [R] on the CPU, got {queries.dtype} {list(queries.shape)} on "
                f"{queries.device}; make it anew for each batch, or set it to None for all tokens"
            )
        if queries.numel() and not (
            int(queries[0]) >= 0 and int(queries[-1]) < T and bool((queries[1:] > queries[:-1]).all())
        ):
            raise ValueError(
                f"attach: handle.queries must ascend from 0 to at most {T - 1}, the last of the batch's tokens, got "
                f"{queries[:3].tolist()} to {int(queries[-1])}; make it anew for each batch, or set it to None"
            )
        return to_device(queries, positions.device)
