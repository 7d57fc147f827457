"""The layers of a decoder whose attention can be a teacher, and why each of the others can't."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""What the code of an attention module names that calls the attention function which Transformers looks up by name."""


class DecoderLayers(NamedTuple):
    """What the layers of a decoder are.

    Attributes:
        number: of all layers. attentions: the attention module of each layer whose attention can be a teacher.
        local: those of them whose queries see a window or chunk of keys.
        refused: each other layer, and what is in the way.
        callers: every module of the layers that calls the attention function, and its layer.
    """

    number: int
    attentions: dict[int, nn.Module]
    local: frozenset[int]
    refused: dict[int, str]
    callers: list[tuple[int, nn.Module]]

    def chosen(self, layers: Sequence[int] | None) -> list[int]:
        """The layers to attach, ascending. None: those that see all keys; where there are none, all that can."""
        if layers is None:
            return [n for n in self.attentions if n not in self.local] or list(self.attentions)
        try:
            chosen = sorted({int(operator.index(layer)) for layer in layers})
        except TypeError:
            raise TypeError(f"attach: layers must be a sequence of layer indices, got {layers!r}") from None
        if not chosen or chosen[0] < 0 or chosen[-1] >= self.number:
            raise ValueError(f"attach: layers must be indices below {self.number}, got {chosen}")
        if wrong := [n for n in chosen if n in self.refused]:
            raise ValueError(
                f"attach: layers must be ones whose attention can be a teacher, got layer {wrong[0]}: "
                f"{self.refused[wrong[0]]}; possible here: {list(self.attentions)}"
            )
        return chosen

    def described(self, chosen: Sequence[int]) -> str:
        """One line: the layers that get indexers, and the others by what is in the way."""
        without = dict(self.refused)
        without |= {n: "sees a window of keys" for n in self.attentions if n in self.local and n not in chosen}
        without |= {n: "not asked for" for n in self.attentions if n not in chosen and n not in without}
        others = by_reason(without)
        line = f"indexers on {len(chosen)} of {self.number} layers: {spans(chosen)}"
        return line if not others else f"{line} (none on {others})"


def by_reason(without: Mapping[int, str]) -> str:
    """0-2: a reason; 3: another one."""
    reasons: dict[str, list[int]] = {}
    for layer in sorted(without):
        reasons.setdefault(without[layer], []).append(layer)
    return "; ".join(f"{spans(numbers)}: {reason}" for reason, numbers in reasons.items())


def spans(numbers: Sequence[int]) -> str:
    """0-2, 4: ascending numbers, neighbours joined."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def decoder_layers(decoder: Any, config: Any) -> DecoderLayers:
    """Reads the layers of a decoder; finds none where it has no list of them."""
    blocks = decoder_blocks(decoder)
    kinds = getattr(config, "layer_types", None) or []
    found = [_attentions_of(block) for block in blocks]
    callers = [(layer, module) for layer, modules in enumerate(found) for module in modules]
    attentions: dict[int, nn.Module] = {}
    refused: dict[int, str] = {}
    for layer, modules in enumerate(found):
        kind = kinds[layer] if len(kinds) == len(found) else None
        candidates = [module for module in modules if _reads_the_decoder(blocks[layer], module)]
        obstacle = _obstacle(blocks[layer], modules, candidates, kind)
        if obstacle is None and (width := input_width(candidates[0], config.hidden_size)) != config.hidden_size:
            obstacle = f"reads states of width {width}, where the decoder's hidden_size is {config.hidden_size}"
        if obstacle is None and any(candidates[0] is other for n, other in callers if n != layer):
            obstacle = "shares its attention module with another layer"
        if obstacle is None:
            attentions[layer] = candidates[0]
        else:
            refused[layer] = obstacle
    local = frozenset(
        n for n in attentions if len(kinds) == len(found) and any(x in kinds[n] for x in ("sliding", "chunked"))
    )
    return DecoderLayers(len(found), attentions, local, refused, callers)


def decoder_blocks(decoder: Any) -> list[nn.Module]:
    """The decoder's layers: its list `layers`, or its one list whose modules have attention."""
    if decoder is None:
        return []
    if isinstance(named := getattr(decoder, "layers", None), nn.ModuleList):
        return list(named)
    lists = [x for x in decoder.modules() if isinstance(x, nn.ModuleList) and len(x)]
    outer = [x for x in lists if not any(x is not y and any(x is z for z in y.modules()) for y in lists)]
    lists = [x for x in outer if any(_attentions_of(block) for block in x)] or outer
    return list(lists[0]) if len(lists) == 1 else []


def input_width(module: nn.Module, hidden_size: int) -> int:
    """The width of the hidden states that an attention module reads: a few read more than the decoder's."""
    projection = getattr(module, "q_proj", None)
    return projection.in_features if isinstance(projection, nn.Linear) else hidden_size


def calls_attention_function(module: nn.Module) -> bool:
    """Whether a module's forward looks its attention function up by the name in the config."""
    return INTERFACE in _names_in(module)


def _names_in(module: nn.Module) -> tuple[str, ...]:
    """The names in the code of a module's forward."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return () if code is None else (*code.co_names, *code.co_varnames)


def _attentions_of(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if calls_attention_function(module)]


def _reads_the_decoder(block: nn.Module, module: nn.Module) -> bool:
    """Whether an attention is the decoder's own: causal, and on no other model's states."""
    name = next((name for name, child in block.named_modules() if child is module), "")
    crosses = "cross" in name or "encoder_attn" in name or getattr(module, "is_cross_attention", False) is True
    return not crosses and getattr(module, "is_causal", True) is not False


def _obstacle(block: nn.Module, modules: list[nn.Module], candidates: list[nn.Module], kind: str | None) -> str | None:
    """Why a layer's attention can't be a teacher; None where it can."""
    if not modules:
        own = kind if kind is not None and "full" not in kind else None
        return f"{own or _name_of(block)} does not call the attention function that Transformers looks up by name"
    if not candidates:
        return f"{type(modules[0]).__name__} is not causal, or attends to another model's states"
    if len(candidates) > 1:
        return f"has {len(candidates)} attentions"
    module = candidates[0]
    if any(hasattr(module, name) for name in ("indexer", "compressor")):
        return f"{type(module).__name__} selects or compresses keys by itself"
    if "position_bias" in _names_in(module):
        return f"{type(module).__name__} adds a learned bias to its logits"
    if hasattr(module, "prepare_dynamic_mask"):
        return f"{type(module).__name__} forms a mask of its own from its values"
    if hasattr(module, "lambda_q1"):
        return f"{type(module).__name__} subtracts one softmax from another: no distribution that could be learned"
    return None


def _name_of(block: nn.Module) -> str:
    """What stands in the place of attention: the class of the child that is named after it, or the layer's own."""
    for name, child in block.named_children():
        if ("attn" in name or "attention" in name) and not name.endswith("norm") and "Norm" not in type(child).__name__:
            return type(child).__name__
    return type(block).__name__
