"""The Transformers model inside of what adapters and compilers put around it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

KEYS_OF_THEIR_OWN = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT's methods that put learned keys and values before those of a sequence."""


def unwrapped(model: object) -> PreTrainedModel:
    """The model that computes: of torch.compile's wrapper and of a PeftModel the one inside, whose hooks both run.

    Raises:
        TypeError: no Transformers model, or another wrapper around one.
        ValueError: a PeftModel of a method whose attention sees keys that no token of the batch has.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, OptimizedModule):
            inner = inner._orig_mod
        elif isinstance(inner, nn.Module) and callable(base := getattr(inner, "get_base_model", None)):
            _check_adapters(inner)
            inner = base()
        else:
            raise TypeError(
                "attach: model must be a transformers.PreTrainedModel, or one inside a PeftModel or torch.compile, got "
                f"{type(inner).__name__}; unwrap it: take .module of DistributedDataParallel"
            )
    return inner


def _check_adapters(model: Any) -> None:
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind in KEYS_OF_THEIR_OWN:
            raise ValueError(
                f"attach: adapters must leave the keys to the tokens, got {name!r} of type {kind}, whose learned keys "
                "no indexer could rank; attach to the model without it: model.get_base_model()"
            )
