"""The public names and signatures: a change here is a change for users, and goes into CHANGELOG.md."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from importlib import metadata, resources
from typing import Any

import pytest
import torch

import flash_indexer
from flash_indexer.testing import Shape, make_inputs

INDEX_OPERANDS = "index_q, index_k, index_weights"
SIGNATURES = {
    "IndexerKL": "(loss, kl, entropy)",
    "LightningIndexer": "(hidden_size, *, num_heads, head_dim, q_lora_rank=None, rope_dim, rope_interleaved)",
    "LightningIndexer.forward": "(self, hidden, q_residual, cos, sin, queries=None)",
    "causal_intervals": "(cu_seqlens_q, cu_seqlens_k=None)",
    "check_intervals": "(key_start, key_end, num_keys)",
    "indexer_kl": f"(q, k, {INDEX_OPERANDS}, *, softmax_scale, key_start, key_end, lse=None, target='mean', "
    "token_weight=None, workspace_bytes=1073741824, index_dtype=None, teacher_dtype=None, softcap=None)",
    "indexer_scores": f"({INDEX_OPERANDS}, key_start, key_end)",
    "DSAAttention": "(out, lse, loss, kl, selection)",
    "Selection": "(indices, count, scores)",
    "SparseAttention": "(out, lse)",
    "dsa_attention": f"(q, k, v, {INDEX_OPERANDS}, *, softmax_scale, key_start, key_end, topk, value_dim=None, "
    "sinks=None, always=(0, 0), token_weight=None, kl='forward', kl_scale=None, kl_out=None, deterministic=True, "
    "save_selection=True, workspace_bytes=536870912)",
    "select_keys": f"({INDEX_OPERANDS}, *, key_start, key_end, topk, always=(0, 0), workspace_bytes=536870912)",
    "sparse_attention": "(q, k, v, selection, *, softmax_scale, value_dim=None, sinks=None, deterministic=True, "
    "workspace_bytes=536870912)",
    "sparse_indexer_kl": f"(q, k, {INDEX_OPERANDS}, selection, *, softmax_scale, lse=None, token_weight=None, "
    "deterministic=True, workspace_bytes=536870912)",
    "Quantized": "(values, scale)",
    "quantize": "(x, *, rotation=False)",
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


def test_results_unpack_in_the_order_that_is_promised() -> None:
    """Of three queries the first sees one key (KL and entropy 0), the last three: numbers that tell which is which."""
    x = make_inputs(Shape(((3, 3),), H=2, G=1, D=4, I=2, E=4), seed=0, dtype=torch.float64)
    options: dict[str, Any] = dict(softmax_scale=0.5, key_start=x.key_start, key_end=x.key_end)
    index = (x.index_q, x.index_k, x.index_weights)
    uniform = x.index_weights * 0  # the scores are 0, so KL = log(visible keys) - entropy
    loss, kl, entropy = flash_indexer.indexer_kl(x.q, x.k, x.index_q, x.index_k, uniform, **options)
    visible = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(kl + entropy, visible.log())
    assert (entropy[1:] > 0).all() and float(loss) == pytest.approx(float(kl.mean()))
    out, lse, loss, kl = flash_indexer.warmup_attention(x.q, x.k, x.k, *index, **options)
    torch.testing.assert_close(out[0], x.k[0].expand(2, 4))
    torch.testing.assert_close(lse[0], 0.5 * x.q[0] @ x.k[0, 0])
    assert kl.shape == (3,) and float(loss) == pytest.approx(float(kl.mean())) and float(kl[0]) == pytest.approx(0)


@pytest.mark.parametrize("name", ["flash_indexer", *MODULES])
def test_every_listed_name_is_importable(name: str) -> None:
    module = importlib.import_module(name)
    missing = [listed for listed in getattr(module, "__all__", ()) if not hasattr(module, listed)]
    assert missing == []


def test_the_package_is_typed_and_says_its_version() -> None:
    assert resources.files("flash_indexer").joinpath("py.typed").is_file()
    assert metadata.version("flash-indexer") == flash_indexer.__version__
