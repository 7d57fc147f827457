"""Putting a handle into a model: parameters frozen, hooks added, the attention function switched; all undone again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from flash_indexer.models.handle import IndexerHandle
from flash_indexer.models.hooks import TAP, LayerTap, uncompiled
from flash_indexer.models.layers import DecoderLayers


def install(
    handle: IndexerHandle, found: DecoderLayers, tap_of: Callable[[int, nn.Module], LayerTap], function: str
) -> None:
    """Freezes the handle's model, adds the hooks, switches to the registered `function`; records how to undo each."""
    model, decoder = handle.model, handle.decoder
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                handle.undo_with(partial(_thaw, module, name))
    handle.undo_with(switch_attention(model, decoder, function))
    handle.undo_with(decoder.register_forward_pre_hook(uncompiled(handle.begin), with_kwargs=True).remove)
    handle.undo_with(decoder.register_forward_hook(uncompiled(handle.end)).remove)
    handle.undo_with(decoder.register_forward_hook(uncompiled(handle.release), always_call=True).remove)
    for layer, module in found.callers:
        attached, tap = handle.attentions.get(layer) is module, tap_of(layer, module)
        module.__dict__[TAP] = tap
        handle.undo_with(partial(module.__dict__.pop, TAP, None))
        for undo in tap.install(module) if attached or tap.always else ():
            handle.undo_with(undo)
        if attached:
            verify = uncompiled(partial(handle.verify, layer))
            handle.undo_with(module.register_forward_hook(verify, with_kwargs=True).remove)


def switch_attention(model: PreTrainedModel, decoder: nn.Module, function: str) -> Callable[[], None]:
    """The registered `function` for the decoder; encoders of images or sound keep theirs. Returns what undoes it."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = {id(each.config): (each.config, each.config._attn_implementation) for each in models}
    model.set_attn_implementation(function)
    of_decoder = {
        id(each.config)
        for each in models
        if any(module is decoder for module in each.modules()) or any(module is each for module in decoder.modules())
    }
    for name, (config, implementation) in before.items():
        if name not in of_decoder:
            config._attn_implementation = implementation

    def put_back() -> None:
        for config, implementation in before.values():
            config._attn_implementation = implementation

    return put_back


def _thaw(module: nn.Module, name: str) -> None:
    """By name: offloading puts other parameter objects in the place of those that were frozen."""
    module.get_parameter(name).requires_grad_(True)
