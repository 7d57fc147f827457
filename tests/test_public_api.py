"""The public names and signatures: a change here is a change for users, and goes into CHANGELOG.md."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from importlib import metadata, resources
from typing import Any

import pytest

import flash_indexer

INDEX_OPERANDS = "index_q, index_k, index_weights"
SIGNATURES = {
    "IndexerKL": "(loss, kl, entropy)",
    "LightningIndexer": "(hidden_size, *, num_heads, head_dim, q_lora_rank=None, rope_dim, rope_interleaved)",
    "LightningIndexer.forward": "(self, hidden, q_residual, cos, sin)",
    "causal_intervals": "(cu_seqlens_q, cu_seqlens_k=None)",
    "check_intervals": "(key_start, key_end, num_keys)",
    "indexer_kl": f"(q, k, {INDEX_OPERANDS}, *, softmax_scale, key_start, key_end, lse=None, target='mean', "
    "token_weight=None, workspace_bytes=536870912)",
    "indexer_scores": f"({INDEX_OPERANDS}, key_start, key_end)",
    "WarmupAttention": "(out, lse, loss, kl)",
    "warmup_attention": f"(q, k, v, {INDEX_OPERANDS}, *, softmax_scale, key_start, key_end, target='mean', "
    "token_weight=None, workspace_bytes=536870912, deterministic=True)",
}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(flash_indexer.__path__, "flash_indexer.")
    if not module.name.startswith("flash_indexer.kernels") and not module.name.rpartition(".")[2].startswith("_")
)


def bare_signature(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults without annotations."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_public_names() -> None:
    assert set(flash_indexer.__all__) - {"__version__"} == {name.split(".")[0] for name in SIGNATURES}
    assert len(flash_indexer.__all__) == len(set(flash_indexer.__all__))


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    found: Any = flash_indexer
    for piece in name.split("."):
        found = getattr(found, piece)
    assert bare_signature(found) == SIGNATURES[name]


def test_a_result_unpacks() -> None:
    loss, kl, entropy = flash_indexer.IndexerKL(loss=1, kl=2, entropy=3)  # type: ignore[arg-type]
    assert (loss, kl, entropy) == (1, 2, 3)


@pytest.mark.parametrize("name", ["flash_indexer", *MODULES])
def test_every_listed_name_is_importable(name: str) -> None:
    module = importlib.import_module(name)
    missing = [listed for listed in getattr(module, "__all__", ()) if not hasattr(module, listed)]
    assert missing == []


def test_the_package_is_typed_and_says_its_version() -> None:
    assert resources.files("flash_indexer").joinpath("py.typed").is_file()
    assert metadata.version("flash-indexer") == flash_indexer.__version__
