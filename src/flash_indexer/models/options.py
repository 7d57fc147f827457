"""The checks of what `attach` is asked for, whichever indexers it attaches."""

from __future__ import annotations

from typing import Any

from torch import nn

from flash_indexer.models.families import config_value
from flash_indexer.ops.quantization import check_rotation
from flash_indexer.parallel.mesh import Parallel


def check_target(target: str, num_heads: int, source: Any, parallel: Parallel | None) -> None:
    """Raises ValueError for a target that is none, or that doesn't fit the heads or how they are shared out.

    source: the model's config, or an attention module, which says how many heads the attention has.
    """
    if target not in ("mean", "per_head", "sum_logits"):
        raise ValueError(f'attach: target must be "mean", "per_head" or "sum_logits", got {target!r}')
    if target == "per_head" and parallel is not None and parallel.tp > 1:
        raise ValueError(f'attach: target="per_head" has no sum over heads to share out, got tp={parallel.tp}; use cp')
    if target != "per_head":
        return
    heads = source.num_heads if isinstance(source, nn.Module) else config_value(source, "num_attention_heads")
    if num_heads != heads:
        raise ValueError(f'attach: target="per_head" needs num_heads = {heads}, the model\'s, got {num_heads}')


def check_arithmetic(index_dtype: str | None, teacher_dtype: str | None, head_dim: int) -> None:
    """Raises ValueError for a dtype that the loss doesn't take, or an index dim that can't be rotated."""
    allowed = ("fp8", "fp8_unrotated")
    for name, value in (("index_dtype", index_dtype), ("teacher_dtype", teacher_dtype)):
        if value is not None and value not in allowed:
            raise ValueError(f"attach: {name} must be None or one of {', '.join(map(repr, allowed))}, got {value!r}")
    check_rotation('attach: index_dtype="fp8"', head_dim, index_dtype == "fp8")
