"""Models in the sparse stage on the GPU: the oracle's keys, and MLA's queries in runs, by kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedModel

import flash_indexer.indexer
from flash_indexer import reference
from flash_indexer.indexer import LightningIndexer
from flash_indexer.intervals import causal_intervals
from flash_indexer.models import absorbed
from flash_indexer.models.attach import attach
from flash_indexer.models.oracle import oracle_keys
from flash_indexer.models.sparse import SparseHandle
from flash_indexer.ops import bodies
from flash_indexer.testing.sparse import selection_mask

pytestmark = pytest.mark.gpu
DEVICE, DTYPE = "cuda", torch.bfloat16
SIZES = dict(vocab_size=61, hidden_size=192, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=4096)
LLAMA = LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2, head_dim=64)
MLA = DeepseekV3Config(
    **SIZES, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=64, kv_lora_rank=512, qk_rope_head_dim=64,
    qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=2,
)  # fmt: skip
LENGTHS, K = (300, 1, 411), 16


def build(config: LlamaConfig | DeepseekV3Config) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPE).to(DEVICE)
    for parameter in model.parameters():
        parameter.data *= 2.0  # attention far from uniform
    return model.requires_grad_(True)


def sparsely(model: PreTrainedModel, topk: int, keys: str = "indexer") -> SparseHandle:
    torch.manual_seed(1)
    handle = attach(model, num_heads=4, head_dim=64, topk=topk)
    assert isinstance(handle, SparseHandle)
    handle.keys, handle.deterministic = keys, False
    return handle


def hidden_states(model: PreTrainedModel) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(DEVICE)
    ids = torch.randint(1, 61, positions.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    out: Tensor = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return out


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_oracles_keys_hold_the_most_attention() -> None:
    start, end = (x.to(DEVICE) for x in causal_intervals(torch.tensor([0, *LENGTHS]).cumsum(0)))
    generator = torch.Generator(DEVICE).manual_seed(0)
    q = torch.randn(len(start), 6, 64, device=DEVICE, generator=generator).to(DTYPE)
    k = torch.randn(len(start), 2, 64, device=DEVICE, generator=generator).to(DTYPE)
    with bodies.need_kernels():
        found = oracle_keys(q, k, start, end, K, softmax_scale=0.4, workspace_bytes=2**20)
    with bodies.use(bodies.TORCH):
        expected = oracle_keys(q, k, start, end, K, softmax_scale=0.4, workspace_bytes=2**22)
    assert torch.equal(found.count, expected.count)
    torch.testing.assert_close(found.scores.sort(-1).values, expected.scores.sort(-1).values, rtol=1e-4, atol=1e-6)
    p = reference.target_distribution(q.double(), k.double(), 0.4, start, end)
    held, best = (p * selection_mask(found, len(k))).sum(-1), p.topk(K).values.sum(-1)
    torch.testing.assert_close(held, best, rtol=1e-5, atol=0.0)
    assert float(best.min()) < 0.9


@pytest.mark.parametrize("config", [LLAMA, MLA], ids=["llama", "mla"])
def test_the_oracles_keys_are_all_keys_where_k_covers_them(config: LlamaConfig | DeepseekV3Config) -> None:
    """The same output as with the indexers' keys; with few keys another, and the indexers learn."""
    found = []
    for keys, topk in (("indexer", 512), ("oracle", 512), ("oracle", K)):
        model = build(config)
        handle = sparsely(model, topk, keys)
        out = hidden_states(model)
        out.float().square().mean().backward()
        found.append(out.detach())
        gradients = [x.grad for x in handle.indexers.parameters() if x.grad is not None]
        assert gradients and all(bool(x.isfinite().all()) and bool(x.abs().sum() > 0) for x in gradients)
        assert all(float(loss.kl) > 0 for loss in handle.losses().values())
    assert difference(found[1], found[0]) < 1e-2 < 3e-2 < difference(found[2], found[0])


def test_runs_of_mla_queries_give_the_same_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for whole in (True, False):
        monkeypatch.setattr(absorbed, "WHOLE_BYTES", 2**40 if whole else 0)
        monkeypatch.setattr(absorbed, "RUN_BYTES", 100 * 4 * 1088 * 2)  # 100 tokens of 712
        model = build(MLA)
        handle = sparsely(model, K)
        out = hidden_states(model)
        out.float().square().mean().backward()
        kl = torch.stack([loss.kl for loss in handle.losses().values()])
        gradients = [x.grad.flatten().float() for x in model.parameters() if x.grad is not None]
        indexers = [x.grad.flatten().float() for x in handle.indexers.parameters() if x.grad is not None]
        found.append((out.detach(), kl, torch.cat(gradients), torch.cat(indexers)))
    out, kl, gradients, indexers = (difference(a, b) for a, b in zip(*found, strict=True))
    assert out < 1e-3 and kl < 1e-3 and gradients < 1e-2 and indexers < 1e-2


@pytest.mark.parametrize("few", [0, 2**40], ids=["terms", "wide"])
def test_head_weights_and_their_gradient_are_rounded_like_float32(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16 hidden states: within a few units of float32's last place of the sums' size."""
    monkeypatch.setattr(flash_indexer.indexer, "_MANY", few)
    torch.manual_seed(0)
    indexer = LightningIndexer(1024, num_heads=8, head_dim=64, rope_dim=32, rope_interleaved=False).to(DEVICE)
    hidden = torch.randn(3000, 1024, device=DEVICE).to(DTYPE)
    angles = torch.ones(3000, 32, device=DEVICE), torch.zeros(3000, 32, device=DEVICE)
    got = indexer(hidden, None, *angles)[2]
    d_out = torch.randn_like(got)
    (gradient,) = torch.autograd.grad(got, indexer.weights_proj.weight, d_out)
    factor, weight = 8**-0.5 * 64**-0.5, indexer.weights_proj.weight.detach().double()
    assert got.dtype == gradient.dtype == torch.float32
    for found, a, b in ((got, hidden, weight.T), (gradient, d_out.T, hidden)):
        exact, size = a.double() @ b.double() * factor, a.double().abs() @ b.double().abs() * factor
        assert float(((found.double() - exact).abs() / size).max()) < 2e-6
