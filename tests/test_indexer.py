"""LightningIndexer: parity with Transformers' indexers, initialisation, dtypes, detachment, rejections."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

from flash_indexer.indexer import LightningIndexer, bfloat16_terms

HIDDEN, I, E, ROPE, Q_LORA = 64, 4, 32, 16, 48

families = {
    "deepseek_v32": (v32.DeepseekV32Config, v32.DeepseekV32Indexer, v32.DeepseekV32RotaryEmbedding, False),
    "glm_moe_dsa": (glm.GlmMoeDsaConfig, glm.GlmMoeDsaIndexer, glm.GlmMoeDsaRotaryEmbedding, True),
}
both_layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["half_split", "interleaved"])


def indexer(hidden_size: Any = HIDDEN, **changes: Any) -> LightningIndexer:
    sizes = dict(num_heads=I, head_dim=E, q_lora_rank=Q_LORA, rope_dim=ROPE, rope_interleaved=False)
    return LightningIndexer(hidden_size, **{**sizes, **changes})


def rotary(length: int, dim: int = ROPE, theta: float = 100.0) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] * theta ** -(torch.arange(0, dim, 2) / dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def inputs(length: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(3)
    cos, sin = rotary(length)
    residual = torch.randn(length, Q_LORA)
    return {"hidden": torch.randn(length, HIDDEN), "q_residual": residual, "cos": cos, "sin": sin}


def index_scores(index_q: Tensor, index_k: Tensor, index_weights: Tensor) -> Tensor:
    """i[..., t, s] = sum_j index_weights[t,j] · ReLU(index_q[t,j]·index_k[s]), in float64."""
    logits = torch.einsum("...tje,...se->...tjs", index_q.double(), index_k.double())
    return (index_weights.double().unsqueeze(-1) * logits.relu()).sum(-2)


def ranking_agreement(scores: Tensor, order: Tensor, visible: Tensor) -> tuple[int, int, int]:
    """Rows, rows ranked alike on their untied visible keys, and the number of those keys."""
    tolerance = 1e-5 * scores.abs().max()
    rows = alike = untied_keys = 0
    pairs = zip(scores.flatten(0, 1), order.flatten(0, 1), visible.flatten(0, 1), strict=True)
    for score, their_order, seen in pairs:
        gap = (score[:, None] - score).abs().masked_fill(~seen, math.inf).fill_diagonal_(math.inf)
        untied = seen & (gap.amin(-1) > tolerance)
        our_order = score.argsort(descending=True)
        rows += 1
        alike += torch.equal(our_order[untied[our_order]], their_order[untied[their_order]])
        untied_keys += int(untied.sum())
    return rows, alike, untied_keys


@pytest.mark.parametrize("family", families)
def test_parity_with_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config_type, indexer_type, rotary_type, interleaved = families[family]
    batch, length = 2, 37
    config = config_type(
        hidden_size=HIDDEN,
        q_lora_rank=Q_LORA,
        qk_rope_head_dim=ROPE,
        index_n_heads=I,
        index_head_dim=E,
        index_topk=length,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    torch.manual_seed(11)
    theirs = indexer_type(config, 0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    hidden, q_residual = torch.randn(batch, length, HIDDEN), torch.randn(batch, length, Q_LORA)
    positions = torch.arange(length)[None]
    cos, sin = rotary_type(config)(hidden, positions)
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, -1, -1)

    captured: list[Tensor] = []
    original = torch.Tensor.topk

    def topk(scores: Tensor, *args: Any, **kwargs: Any) -> Any:
        captured.append(scores.clone())
        return original(scores, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", topk)
        order = theirs(hidden, q_residual, (cos, sin), visible, positions).long()
    (ranked,) = captured
    assert ranked.isneginf().equal(~visible)
    wanted = ranked[visible].double()

    def our_scores(rope_interleaved: bool) -> Tensor:
        ours = indexer(rope_interleaved=rope_interleaved)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        return index_scores(*ours(hidden, q_residual, cos, sin)).detach()

    scores = our_scores(interleaved)
    assert (scores[visible] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    rows, alike, untied_keys = ranking_agreement(scores, order, visible)
    assert untied_keys > 0.8 * visible.sum()
    assert alike == rows

    swapped = our_scores(not interleaved)
    assert (swapped[visible] - wanted).abs().max() > 0.1 * wanted.abs().max()
    assert ranking_agreement(swapped, order, visible)[1] < 0.5 * rows


def test_without_q_lora_the_queries_come_from_hidden() -> None:
    module = indexer(q_lora_rank=None, hidden_size=Q_LORA)
    twin = indexer(hidden_size=Q_LORA)
    twin.load_state_dict(module.state_dict(), strict=True)
    given = inputs()
    hidden, cos, sin = given["q_residual"], given["cos"], given["sin"]
    for got, wanted in zip(module(hidden, None, cos, sin), twin(hidden, hidden, cos, sin), strict=True):
        assert torch.equal(got, wanted)


def test_parameters_are_deepseeks() -> None:
    module = indexer()
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "wq_b.weight": (I * E, Q_LORA),
        "wk.weight": (E, HIDDEN),
        "k_norm.weight": (E,),
        "k_norm.bias": (E,),
        "weights_proj.weight": (I, HIDDEN),
    }
    assert isinstance(module.k_norm, nn.LayerNorm) and module.k_norm.eps == 1e-6
    assert indexer(q_lora_rank=None).wq_b.weight.shape == (I * E, HIDDEN)


def test_weights_carry_both_factors() -> None:
    module, given = indexer(), inputs()
    index_weights = module(**given)[2]
    wanted = given["hidden"].double() @ module.weights_proj.weight.double().T / math.sqrt(I * E)
    torch.testing.assert_close(index_weights.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lead", [(), (0,), (7,), (2, 7), (2, 3, 7)])
def test_leading_dims(lead: tuple[int, ...]) -> None:
    module = indexer()
    hidden, q_residual = torch.randn(*lead, HIDDEN), torch.randn(*lead, Q_LORA)
    cos, sin = torch.randn(2, *lead[-1:], ROPE)
    outputs = module(hidden, q_residual, cos, sin)
    assert [tuple(o.shape) for o in outputs] == [(*lead, I, E), (*lead, E), (*lead, I)]
    cos, sin = cos.expand(*lead, ROPE), sin.expand(*lead, ROPE)
    flat = module(*(x.reshape(-1, x.shape[-1]) for x in (hidden, q_residual, cos, sin)))
    for got, wanted in zip(outputs, flat, strict=True):
        torch.testing.assert_close(got, wanted.reshape(got.shape))


@both_layouts
def test_rope_turns_the_first_dims_only(interleaved: bool) -> None:
    module, given = indexer(rope_interleaved=interleaved), inputs()
    still = {**given, "cos": torch.ones_like(given["cos"]), "sin": torch.zeros_like(given["sin"])}
    # Pairs are turned in place: with every angle 0, rope changes nothing.
    torch.testing.assert_close(module(**still)[1], module.k_norm(module.wk(given["hidden"])))
    for turned, unturned in zip(module(**given)[:2], module(**still)[:2], strict=True):
        assert torch.equal(turned[..., ROPE:], unturned[..., ROPE:])
        # Position 0 has angle 0; later positions turn every rotary dim and keep each token's norm.
        torch.testing.assert_close(turned[0], unturned[0])
        assert ((turned - unturned)[1:, ..., :ROPE].abs().flatten(0, -2).amax(0) > 1e-3).all()
        torch.testing.assert_close(turned.norm(dim=-1), unturned.norm(dim=-1))


@both_layouts
def test_rope_angles_are_relative(interleaved: bool) -> None:
    module = indexer(rope_interleaved=interleaved)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    given = inputs(12)
    hidden = given["hidden"][:1].expand(12, -1)
    q_residual = given["q_residual"][:1].expand(12, -1)
    scores = index_scores(*module(hidden, q_residual, given["cos"], given["sin"]))
    assert (scores[:, 0] - scores[0, 0]).abs().max() > 1e-2 * scores.abs().max()
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-5)


class Realistic(NamedTuple):
    hidden: Tensor
    visible: Tensor
    target: Tensor
    uniform_kl: Tensor


def realistic(rms: float, length: int = 192, hidden_size: int = 576) -> Realistic:
    """Hidden states and attention like a language model's.

    A common mean, outlier dims and topics shared by neighbours; a first token unlike the others, which takes
    much of the attention, the rest of which is recent and peaked.
    """
    generator = torch.Generator().manual_seed(5)
    normal = partial(torch.randn, generator=generator)
    topics = normal(length // 16, hidden_size).repeat_interleave(16, dim=0)
    hidden = normal(hidden_size) + 0.7 * topics + normal(length, hidden_size)
    hidden[:, :3] += torch.tensor([12.0, -8.0, 6.0])
    hidden[0] = 2 * normal(hidden_size)
    hidden = hidden * (rms / hidden.square().mean(-1, keepdim=True).sqrt())
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    distance = torch.arange(length)[:, None] - torch.arange(length)
    logits = 1.5 * normal(length, length) - 0.7 * (1.0 + distance.clamp(min=0)).log()
    logits[:, 0] += 6
    target = logits.masked_fill(~visible, -math.inf).softmax(-1)
    uniform = torch.xlogy(target, target).sum(-1) + visible.sum(-1).log()
    return Realistic(hidden, visible, target, uniform.mean())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rms", [0.05, 1.0, 3.0])
def test_fresh_indexer_is_near_uniform_and_learns(rms: float, seed: int) -> None:
    hidden, visible, target, uniform_kl = realistic(rms)
    torch.manual_seed(seed)
    module = LightningIndexer(576, num_heads=8, head_dim=64, rope_dim=32, rope_interleaved=False)
    scores = index_scores(*module(hidden, None, *rotary(len(hidden), 32, 10_000.0)))
    log_prediction = scores.masked_fill(~visible, -math.inf).log_softmax(-1).masked_fill(~visible, 0)
    kl = (torch.xlogy(target, target) - target * log_prediction).sum(-1).mean()
    assert uniform_kl > 1
    assert abs(kl / uniform_kl - 1) < 0.05

    last = scores[-1].detach()
    assert last.std() > 0.1 * last.abs().mean()
    assert last.std() > 1e-3 * rms**2

    kl.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().mean() > 1e-10, name
    heads = module.wq_b.weight.grad.unflatten(0, (8, 64)).flatten(1).norm(dim=-1)
    assert (heads > 1e-3 * heads.max()).all()


@pytest.mark.parametrize("q_lora_rank", [None, 1536])
def test_fresh_scores_do_not_grow_with_the_sizes(q_lora_rank: int | None) -> None:
    torch.manual_seed(2)
    module = LightningIndexer(
        2048, num_heads=64, head_dim=128, q_lora_rank=q_lora_rank, rope_dim=64, rope_interleaved=False
    )
    residual = None if q_lora_rank is None else torch.randn(32, q_lora_rank)
    scores = index_scores(*module(torch.randn(32, 2048), residual, *rotary(32, 64)))
    assert 1e-3 < scores.std(-1).mean() < 0.1


def test_reset_parameters_draws_all_of_them_again() -> None:
    torch.manual_seed(4)
    module = indexer()
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    module.reset_parameters()
    assert abs(module.wq_b.weight.std() / 0.02 - 1) < 0.1
    assert abs(module.wk.weight.std() / 0.02 - 1) < 0.1
    assert abs(module.weights_proj.weight.std() * math.sqrt(HIDDEN) / 0.04 - 1) < 0.2
    assert module.k_norm.weight.eq(1).all() and module.k_norm.bias.eq(0).all()


@pytest.mark.parametrize("q_lora_rank", [None, Q_LORA])
def test_inputs_get_no_gradient(q_lora_rank: int | None) -> None:
    module = indexer(q_lora_rank=q_lora_rank)
    given = {name: value.requires_grad_() for name, value in inputs().items()}
    residual = given["q_residual"] if q_lora_rank else None
    outputs = module(given["hidden"], residual, given["cos"], given["sin"])
    sum(output.square().sum() for output in outputs).backward()
    assert all(value.grad is None for value in given.values())
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("bfloat16", ()), ("half", ()), ("to", (torch.bfloat16,)), ("to", ("cpu", torch.half))],
)
def test_head_weights_stay_float32(method: str, arguments: tuple[Any, ...]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), indexer())
    module, given = model[1], inputs()
    before = module.weights_proj.weight.detach().clone()
    module.weights_proj.weight.grad = torch.full_like(before, 1 / 3)
    getattr(model, method)(*arguments)
    low = model[0].weight.dtype
    assert low in (torch.bfloat16, torch.float16)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.float32 if name == "weights_proj.weight" else low), name
    assert torch.equal(module.weights_proj.weight, before)
    assert module.weights_proj.weight.grad.equal(torch.full_like(before, 1 / 3))

    hidden = given["hidden"].to(low)
    index_q, index_k, index_weights = module(hidden, given["q_residual"].to(low), given["cos"], given["sin"])
    assert (index_q.dtype, index_k.dtype, index_weights.dtype) == (low, low, torch.float32)
    wanted = hidden.double() @ before.double().T / math.sqrt(I * E)
    torch.testing.assert_close(index_weights.double(), wanted, rtol=1e-5, atol=1e-7)


def test_head_weights_follow_moves_and_double() -> None:
    module = indexer()
    assert module.to("meta").weights_proj.weight.device.type == "meta"
    outputs = module(**{name: value.to("meta") for name, value in inputs().items()})
    assert [tuple(o.shape) for o in outputs] == [(7, I, E), (7, E), (7, I)]
    module = indexer().double()
    outputs = module(**{name: value.double() for name, value in inputs().items()})
    assert {o.dtype for o in outputs} == {torch.float64}
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert indexer().weights_proj.weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rope_dim", [4, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_first_and_second_derivatives_of_the_rope(interleaved: bool, rope_dim: int) -> None:
    module = indexer(head_dim=8, rope_dim=rope_dim, rope_interleaved=interleaved).double()
    x, angles = (torch.randn(3, n, dtype=torch.float64) for n in (8, rope_dim // 2))
    x.requires_grad_()

    def turned(x: Tensor) -> Tensor:
        return module.rope(x, angles.cos(), angles.sin())

    assert torch.autograd.gradcheck(turned, x) and torch.autograd.gradgradcheck(turned, x)


def test_float32_parameters_train_against_a_bfloat16_model() -> None:
    module, given = indexer(), inputs()
    exact = module(**given)
    low = {name: value.bfloat16() for name, value in given.items()}
    outputs = module(low["hidden"], low["q_residual"], given["cos"], given["sin"])
    assert [o.dtype for o in outputs] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for got, wanted in zip(outputs, exact, strict=True):
        assert (got.float() - wanted).norm() < 0.01 * wanted.norm()
    sum(output.float().square().sum() for output in outputs).backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


def test_autocast_changes_nothing() -> None:
    module, given = indexer(), inputs()
    wanted = module(**given)
    with torch.autocast("cpu", torch.bfloat16):
        assert (given["hidden"] @ given["hidden"].T).dtype == torch.bfloat16
        got = module(**given)
    assert all(g.dtype == torch.float32 and torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_compiles_without_graph_breaks() -> None:
    module, given = indexer(rope_interleaved=True), inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(**given), module(**given), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8"])
@pytest.mark.parametrize("name", ["hidden_size", "num_heads", "head_dim", "rope_dim", "q_lora_rank"])
def test_rejects_sizes(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"LightningIndexer: {name} must be a positive integer, got"):
        indexer(**{name: value})


@pytest.mark.parametrize("rope_dim", [15, E + 2])
def test_rejects_rope_dim(rope_dim: int) -> None:
    with pytest.raises(ValueError, match=f"rope_dim must be even and at most head_dim = 32, got {rope_dim}"):
        indexer(rope_dim=rope_dim)
    assert indexer(rope_dim=E)(**{**inputs(), "cos": torch.ones(7, E), "sin": torch.zeros(7, E)})


@pytest.mark.parametrize("value", [None, 0, "interleaved"])
def test_rejects_rope_layout(value: Any) -> None:
    with pytest.raises(ValueError, match=r"rope_interleaved must be False .* or True"):
        indexer(rope_interleaved=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(7, 63)}, r"hidden must be \[..., hidden_size\] = \[..., 64\], got \[7, 63\]"),
        ({"hidden": torch.zeros(())}, r"hidden must be .* got \[\]"),
        ({name: torch.zeros(7, n, dtype=torch.int64) for name, n in (("hidden", 64), ("q_residual", 48))},
         "hidden must be floating point, got torch.int64"),
        ({"q_residual": None}, r"q_residual must be \[..., q_lora_rank\] = \[7, 48\], got None; pass"),
        ({"q_residual": torch.zeros(7, 47)}, r"q_residual must be .* = \[7, 48\], got \[7, 47\]"),
        ({"q_residual": torch.zeros(6, 48)}, r"q_residual must be .* = \[7, 48\], got \[6, 48\]"),
        ({"q_residual": torch.zeros(7, 48, dtype=torch.bfloat16)},
         "q_residual must have hidden's dtype torch.float32, got torch.bfloat16; cast"),
        ({"cos": torch.zeros(7, 8)}, r"cos must be \[..., rope_dim\] = \[7, 16\].* got \[7, 8\]"),
        ({"sin": torch.zeros(7, 32)}, r"sin must be \[..., rope_dim\] = \[7, 16\].* got \[7, 32\]"),
        ({"cos": torch.zeros(6, 16)}, r"cos must be .* got \[6, 16\]"),
        ({"sin": torch.zeros(1, 7, 16)}, r"sin must be .* got \[1, 7, 16\]"),
        ({"sin": torch.zeros(())}, r"sin must be .* got \[\]"),
        ({"cos": torch.zeros(7, 16, dtype=torch.int32)}, "cos must be floating point, got torch.int32"),
        ({"cos": torch.zeros(7, 16, device="meta")}, "cos must be on hidden's device cpu, got meta; move"),
        ({"q_residual": torch.zeros(7, 48, device="meta")}, "q_residual must be on .* got meta"),
    ],
)  # fmt: skip
def test_rejects_inputs(changes: dict[str, Any], message: str) -> None:
    module, given = indexer(), inputs()
    module(**given)
    with pytest.raises(ValueError, match=f"LightningIndexer: {message}"):
        module(**{**given, **changes})


def test_rejects_an_unexpected_q_residual() -> None:
    with pytest.raises(ValueError, match=r"q_residual must be None because .* got \[7, 48\]; construct"):
        indexer(q_lora_rank=None)(**inputs())


def test_rejects_a_module_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"wk\.weight must be on hidden's device cpu, got meta; move"):
        indexer().to("meta")(**inputs())


def test_three_bfloat16_terms_are_a_float32_number() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1000)
    terms = bfloat16_terms(x)
    assert terms.dtype == torch.bfloat16
    assert float(((terms.double().sum(0) - x.double()).abs() / x.double().abs()).max()) <= 2**-24
    assert float(((terms[:2].double().sum(0) - x.double()).abs() / x.double().abs()).max()) > 2**-20
