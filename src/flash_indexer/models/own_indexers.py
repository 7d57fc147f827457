"""The indexers that a model itself has: their parameters, and the operands of the scores that they compute.

Transformers computes these scores without gradients, all [heads, T, S] of them at once, and hands on nothing but the
ranks. Here the same parameters give index_q, index_k and index_weights, with gradients, for the operators.

What families do beyond DeepSeek-V3.2 (LightningIndexer has its formula):

    indexer of          rope turns                     queries are made of
    DeepSeek-V3.2       the first dims, half-split     the normed query residual
    A.X-K2              the first dims, half-split     the normed query residual
    GLM-MoE-DSA         the first dims, interleaved    the normed query residual
    Dots 3 Note         the first dims, interleaved    the normed query residual, scaled
    Hy4                 the last dims, half-split      the normed query residual
    Mistral Large 4     the first dims, interleaved,   LayerNorm of the hidden state; then times
                        or none (a layer says which)   scale[j] · log(position + 1) + bias[j]

The class decides: `rope_interleave` and `indexer_rope_interleave` in these models' configs change nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flash_indexer.indexer import LightningIndexer, no_autocast
from flash_indexer.models.layers import DecoderLayers
from flash_indexer.models.shared_indexers import Operands


@dataclass(frozen=True)
class IndexerForm:
    """How a family's indexer differs from DeepSeek-V3.2's."""

    rope_interleaved: bool = False
    rope_last: bool = False
    """Rope turns the last of the E dims instead of the first."""


FORMS = {
    "DeepseekV32Indexer": IndexerForm(),
    "AXK2Indexer": IndexerForm(),
    "GlmMoeDsaIndexer": IndexerForm(rope_interleaved=True),
    "Dots3NoteTextIndexer": IndexerForm(rope_interleaved=True),
    "HYV4Indexer": IndexerForm(rope_last=True),
    "MistralLarge4TextIndexer": IndexerForm(rope_interleaved=True),
}
"""By the name of the class that Transformers gives a family's indexer."""


class OwnIndexer(LightningIndexer):
    """A model's own indexer: its parameters are the model's, and the operands are those of the family's scores.

        i[t,s] = sum_j index_weights[t,j] · ReLU(index_q[t,j]·index_k[s])

    for all keys s, which is what the model ranks, to the rounding of its dtype. Products are formed in hidden's dtype;
    norm, rope and head weights in float32 at least. State dict keys are those of the model's module.

    Args:
        own: the module in the model's attention.

    Raises:
        ValueError: an indexer of a family whose scores aren't known here.
    """

    def __init__(self, own: Any) -> None:
        nn.Module.__init__(self)  # LightningIndexer's would make parameters
        self.form = own_form(own)
        self.hidden_size, self.num_heads, self.head_dim = own.hidden_size, own.n_heads, own.head_dim
        self.q_lora_rank = None if hasattr(own, "q_input_norm") else own.q_lora_rank
        self.rope_dim = own.qk_rope_head_dim
        self.rope_interleaved = self.form.rope_interleaved
        self.without_rope = not getattr(own, "use_rope", True)
        for name, module in own.named_children():
            self.add_module(name, module)

    def forward(
        self,
        hidden: Tensor,
        q_residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        queries: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Operands:
        """Operands of the index scores, as LightningIndexer's; the inputs are detached.

        Args:
            positions: int [...], of every token in its document; read where queries are scaled by it.
        """
        if not hasattr(self, "q_input_norm"):
            return super().forward(hidden, q_residual, cos, sin, queries)
        self._check(hidden, q_residual, cos, sin)
        assert positions is not None
        hidden, cos, sin = hidden.detach(), cos.detach(), sin.detach()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        norm: Any = self.q_input_norm
        scaling: Any = self.softmax_scaling
        with no_autocast(hidden.device.type):
            gain, bias = norm.weight.to(wide), norm.bias.to(wide)
            normed = F.layer_norm(hidden.to(wide), (self.hidden_size,), gain, bias, norm.eps).to(hidden.dtype)
            index_q, index_k, index_weights = self.operands(hidden, normed, cos, sin, queries)
            positions = positions if queries is None else positions[queries]
            gains = (positions + 1).to(wide).log().unsqueeze(-1) * scaling.scale.to(wide) + scaling.bias.to(wide)
            index_q = (index_q.to(wide) * gains.unsqueeze(-1)).to(hidden.dtype)
        return index_q, index_k, index_weights

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns the dims that the family's rope turns."""
        if self.without_rope:
            return x
        if not self.form.rope_last:
            return super().rope(x, cos, sin)
        still, turned = x[..., : -self.rope_dim], x[..., -self.rope_dim :]
        return torch.cat((still, super().rope(turned, cos, sin)), dim=-1)


def own_form(own: nn.Module) -> IndexerForm:
    """The form of a model's indexer, by its class."""
    kind = type(own).__name__
    if kind not in FORMS:
        raise ValueError(
            f'attach: indexers="own" knows the scores of {", ".join(FORMS)}, got a model with {kind}; attach fresh '
            "indexers to a dense model"
        )
    return FORMS[kind]


def own_indexer(attention: object) -> nn.Module | None:
    """The indexer that a layer's self-attention has of its own; None where it has none, or uses an earlier layer's."""
    indexer: nn.Module | None = getattr(attention, "indexer", None)
    return indexer


def has_own_indexers(found: DecoderLayers) -> bool:
    """Whether any layer of the model has an indexer of its own."""
    return any(own_indexer(module) is not None for _, module in found.callers)


def indexer_sources(attentions: Mapping[int, Any]) -> dict[int, int]:
    """Of every layer that an indexer serves the layer that has it: itself, or the nearest before a sharing layer.

    Source: `skip_topk` of GLM-MoE-DSA, Hy4 and Mistral Large 4 in Transformers, from `indexer_types` of their configs.
    """
    sources: dict[int, int] = {}
    latest = None
    for layer, attention in sorted(attentions.items()):
        if own_indexer(attention) is not None:
            latest = layer
        elif not getattr(attention, "skip_topk", False):
            continue
        if latest is not None:
            sources[layer] = latest
    return sources


def chosen_own_layers(layers: Sequence[int] | None, sources: dict[int, int]) -> list[int]:
    """The layers whose own indexers are trained: all that have one, or those of `layers`.

    Raises:
        ValueError: a layer that has no indexer of its own.
    """
    full = sorted(set(sources.values()))
    if layers is None:
        return full
    try:
        chosen = sorted({int(operator.index(layer)) for layer in layers})
    except TypeError:
        raise TypeError(f"attach: layers must be a sequence of layer indices, got {layers!r}") from None
    for layer in chosen:
        if layer not in full:
            served = f"uses the indexer of layer {sources[layer]}" if layer in sources else "has none"
            raise ValueError(
                f'attach: layers with indexers="own" must be among those that have one, {full}, got {layer}, which '
                f"{served}"
            )
    if not chosen:
        raise ValueError(f"attach: layers must name one of {full} at least, got {layers!r}")
    return chosen


def own_modules(attentions: Mapping[int, object], chosen: Sequence[int]) -> nn.ModuleDict:
    """The chosen layers' own indexers, as modules that share the model's parameters.

    Raises:
        ValueError: a family that isn't known, adapters on an indexer, or parameters that are offloaded, sharded or
            quantised.
    """
    modules = nn.ModuleDict()
    for layer in chosen:
        own = own_indexer(attentions[layer])
        assert own is not None
        if adapted := [name for name, module in own.named_modules() if hasattr(module, "base_layer")]:
            raise ValueError(
                'attach: with indexers="own" the indexers must be without adapters, since their own parameters train, '
                f"got one on {adapted[0]} of layer {layer}; merge it, or leave the indexers out of the adapters: "
                'LoraConfig(exclude_modules=r".*\\.indexer\\..*")'
            )
        modules[str(layer)] = OwnIndexer(own)
        for name, parameter in own.named_parameters():
            fault = _fault(parameter)
            if fault is not None:
                raise ValueError(
                    f'attach: with indexers="own" the parameters of the indexers must be whole, floating-point and in '
                    f"memory, got {name} of layer {layer} {fault}; load the model without offloading, sharding or "
                    "quantisation of its indexers"
                )
    return modules


def _fault(parameter: Tensor) -> str | None:
    if isinstance(parameter, DTensor):
        return "sharded"
    if parameter.is_meta:
        return "offloaded"
    if not parameter.is_floating_point() or torch.finfo(parameter.dtype).bits < 16:
        return f"in {parameter.dtype}"
    return None


def thaw_own(modules: nn.ModuleDict) -> list[Callable[[], object]]:
    """Lets the indexers' parameters train, in float32 at least; what makes them again as they were.

    In bfloat16 an optimizer's steps would be lost in rounding. At the end the values are rounded to the model's dtype.
    """
    return [_thaw(parameter) for parameter in modules.parameters()]


def _thaw(parameter: nn.Parameter) -> Callable[[], object]:
    before, trained = parameter.dtype, parameter.requires_grad
    parameter.data = parameter.data.to(torch.promote_types(before, torch.float32))
    parameter.requires_grad_(True)

    def freeze() -> None:
        parameter.requires_grad_(trained).grad = None
        parameter.data = parameter.data.to(before)

    return freeze
