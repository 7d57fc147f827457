"""The lightning indexer as a module: hidden states in, operands of the index scores out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PROJECTION_STD = 0.02
"""Initial std of wq_b and wk: DeepSeek-V3's initializer range."""

HEAD_WEIGHT_GAIN = 0.04
"""Initial std of weights_proj times sqrt(hidden_size); LightningIndexer.reset_parameters says why."""

_TERMS = 3
_MANY = 2**25  # numbers of hidden states, from which on making terms takes less time than a wide copy


class _WideLinear(nn.Linear):
    """A linear layer whose parameters follow every move, but are never cast below 32 bits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = torch.finfo(moved.dtype).bits < 32
            return tensor.to(moved.device) if narrowed else moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


class _WideProduct(torch.autograd.Function):
    """x W^T in float32 at least, of x [..., D] and W [I, D]; keeps x for the gradient of W, not its wide copy.

    Of a large x in bfloat16 on an NVIDIA GPU tensor cores form it, with float32's rounding: the other factor is a sum
    of three bfloat16 terms, products are exact and sums are in float32. A wide copy would take twice the bytes of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        nvidia = x.device.type == "cuda" and torch.version.hip is None and not torch.compiler.is_compiling()
        narrow = (x.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
        ctx.in_terms = nvidia and narrow and x.numel() >= _MANY
        if ctx.in_terms:
            made = torch.mm(x.reshape(-1, x.shape[-1]), bfloat16_terms(weight).flatten(0, 1).T, out_dtype=torch.float32)
            return made.view(*x.shape[:-1], _TERMS, -1).sum(-2)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), weight.to(wide))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = d_weight = None
        with no_autocast(d_out.device.type):
            if ctx.needs_input_grad[0]:
                d_x = (d_out @ weight.to(d_out.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
                if ctx.in_terms:
                    terms = bfloat16_terms(d_rows.T).flatten(0, 1)
                    d_weight = torch.mm(terms, rows, out_dtype=torch.float32).view(_TERMS, *weight.shape).sum(0)
                else:
                    d_weight = (d_rows.T @ rows.to(d_out.dtype)).to(weight.dtype)
        return d_x, d_weight


def bfloat16_terms(x: Tensor) -> Tensor:
    """Three bfloat16 tensors [3, *x.shape] whose sum is the float32 tensor x but for its last bit: 8 bits each."""
    terms = torch.empty(_TERMS, *x.shape, dtype=torch.bfloat16, device=x.device)
    rest = x
    for n in range(_TERMS):
        terms[n] = rest
        rest = rest - terms[n]
    return terms


class _Rotation(torch.autograd.Function):
    """`_rotated`, whose gradient is the rotation by the opposite angles: fewer launches than its parts' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rope_dim: int, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.layout = rope_dim, interleaved
        return _rotated(x, cos, sin, rope_dim, interleaved, 1)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin), (rope_dim, interleaved) = ctx.saved_tensors, ctx.layout
        return _rotated(d_out, cos, sin, rope_dim, interleaved, -1), None, None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rope_dim: int, interleaved: bool, direction: int) -> Tensor:
    """Each pair (a, b) of the first rope_dim dims of x as (a cos - b sin, b cos + a sin); direction -1: turned back."""
    shape, pair = ((-1, 2), -1) if interleaved else ((2, -1), -2)
    wide = torch.unflatten(x[..., :rope_dim].to(cos.dtype), -1, shape)
    turned = wide * cos.unsqueeze(pair)
    for n, sign in ((0, -direction), (1, direction)):
        turned.select(pair, n).addcmul_(wide.select(pair, 1 - n), sin, value=sign)
    # not torch.cat, which copies the other dims at a third of the memory's rate
    out = x.clone() if rope_dim < x.shape[-1] else torch.empty_like(x)
    out[..., :rope_dim] = turned.flatten(-2)
    return out


class LightningIndexer(nn.Module):
    """Index queries, index keys and head weights, with DeepSeek-V3.2's parameters and arithmetic.

        index_q[t,j]     = rope(wq_b x[t])[j]            x = q_residual if q_lora_rank is given, else hidden
        index_k[s]       = rope(k_norm(wk hidden[s]))    k_norm = LayerNorm with bias, eps 1e-6
        index_weights[t] = weights_proj hidden[t] · I^-0.5 · E^-0.5

    so that i[t,s] = sum_j index_weights[t,j] · ReLU(index_q[t,j]·index_k[s]) is the index score: the factors
    are positive and may stand outside the ReLU. Rope turns the first `rope_dim` of the E dims only.

    Parameters, by state dict key: wq_b.weight [I·E, q_lora_rank or hidden_size], wk.weight [E, hidden_size],
    k_norm.weight and k_norm.bias [E], weights_proj.weight [I, hidden_size]. All are float32,
    whatever torch's default dtype: an optimizer's steps would be lost in bfloat16's rounding. weights_proj stays
    float32 under `.to(dtype)`, `.bfloat16()` and `.half()` of this module or of a model that holds it.

    Args:
        hidden_size: width of the hidden states that enter the attention block, after its input norm.
        num_heads: I, the number of index heads.
        head_dim: E, the index dim.
        q_lora_rank: width of MLA's normed low-rank query residual; None where the model has none.
        rope_dim: how many of the E dims rope turns; even, at most head_dim.
        rope_interleaved: False pairs dim n with n + rope_dim/2 (half-split: DeepSeek-V3.2), True pairs dim 2n
            with 2n + 1 (interleaved: GLM). Trained weights are valid in one layout only.

    Raises:
        ValueError: a size is no positive integer, rope_dim is odd or above head_dim, or rope_interleaved is
            no bool.

    Source: DeepSeek-V3.2, section 2.1, equation 1, and the inference code released with it.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        q_lora_rank: int | None = None,
        rope_dim: int,
        rope_interleaved: bool,
    ) -> None:
        super().__init__()
        sizes = dict(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, rope_dim=rope_dim)
        if q_lora_rank is not None:
            sizes["q_lora_rank"] = q_lora_rank
        check_sizes("LightningIndexer", **sizes)
        if rope_dim % 2 or rope_dim > head_dim:
            raise ValueError(
                f"LightningIndexer: rope_dim must be even and at most head_dim = {head_dim}, got {rope_dim}"
            )
        if not isinstance(rope_interleaved, bool):
            raise ValueError(
                "LightningIndexer: rope_interleaved must be False (half-split, DeepSeek-V3.2) or True "
                f"(interleaved, GLM), got {rope_interleaved!r}"
            )
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.q_lora_rank = q_lora_rank
        self.rope_dim = rope_dim
        self.rope_interleaved = rope_interleaved

        q_in = hidden_size if q_lora_rank is None else q_lora_rank
        self.wq_b = nn.Linear(q_in, num_heads * head_dim, bias=False, dtype=torch.float32)
        self.wk = nn.Linear(hidden_size, head_dim, bias=False, dtype=torch.float32)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-6, dtype=torch.float32)
        self.weights_proj = _WideLinear(hidden_size, num_heads, bias=False, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters: nearly uniform index scores that pass a gradient to every parameter.

            std over s of i[t,s]  ≈  0.6 · (0.04 · rms(hidden[t])) · (0.02 · sqrt(q_in) · rms(x[t]))

        for any I and E: k_norm fixes the norm of index_k, the factors in index_weights cancel the rest. With
        hidden_size = q_in = 576 that is 0.01 for inputs of rms 1 and 0.1 for rms 3, so that the KL starts at
        the uniform prediction's. wq_b and wk have DeepSeek's std, 0.02. With 0.02 for weights_proj as well,
        the scores' std would be about 1 at rms 3, and would grow with hidden_size; with zeros, wq_b, wk and
        k_norm would get no gradient.
        """
        nn.init.normal_(self.wq_b.weight, std=PROJECTION_STD)
        nn.init.normal_(self.wk.weight, std=PROJECTION_STD)
        nn.init.normal_(self.weights_proj.weight, std=HEAD_WEIGHT_GAIN * self.hidden_size**-0.5)
        self.k_norm.reset_parameters()

    def forward(
        self, hidden: Tensor, q_residual: Tensor | None, cos: Tensor, sin: Tensor, queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Operands of the index scores, by the formulas of the class.

        The inputs are detached: the indexer learns from the attention, the main model never from the indexer.
        Products are formed in hidden's dtype, to which parameters of another dtype are cast (float32
        parameters train against a bfloat16 model); norm and rope run in float32 and are rounded once.
        Autocast is off inside: dtypes depend on the inputs alone.

        Args:
            hidden: [..., hidden_size], usually [T, hidden_size].
            q_residual: [..., q_lora_rank], of hidden's dtype; None exactly where q_lora_rank is None.
            cos: [..., rope_dim], leading dims equal to hidden's or broadcasting to them, any float dtype; as
                cat(angles, angles) for both rope layouts, the form of Transformers' rotary embeddings.
            sin: like cos.
            queries: int64 [R], the tokens of hidden [T, hidden_size] whose index_q and index_weights are wanted; None
                means all. Keys are those of all tokens.

        Returns:
            index_q [..., I, E] and index_k [..., E] in hidden's dtype, and index_weights [..., I], with
            I^-0.5 · E^-0.5 multiplied in, in float32 (float64 where hidden is float64). With queries index_q is
            [R, I, E] and index_weights [R, I].

        Raises:
            ValueError: a shape, dtype or device does not fit, or q_residual is missing or unexpected.
        """
        self._check(hidden, q_residual, cos, sin)
        _check_queries(hidden, queries)
        hidden, cos, sin = hidden.detach(), cos.detach(), sin.detach()
        return self.operands(hidden, hidden if q_residual is None else q_residual.detach(), cos, sin, queries)

    def operands(
        self, hidden: Tensor, query_input: Tensor, cos: Tensor, sin: Tensor, queries: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` returns, of inputs that it has checked and detached; `query_input` is what wq_b reads."""
        dtype = hidden.dtype
        wide = torch.promote_types(dtype, torch.float32)
        # The first half of cat(angles, angles) has each pair's angle once: all that either layout needs.
        cos = cos[..., : self.rope_dim // 2].to(wide)
        sin = sin[..., : self.rope_dim // 2].to(wide)
        turn_q, asking = (cos, sin), hidden
        if queries is not None:
            query_input, asking = query_input[queries], hidden[queries]
            cos_q, sin_q = (angle.expand(len(hidden), -1)[queries] for angle in turn_q)
            turn_q = (cos_q, sin_q)

        with no_autocast(hidden.device.type):
            index_q = F.linear(query_input, self.wq_b.weight.to(dtype))
            index_q = torch.unflatten(index_q, -1, (self.num_heads, self.head_dim))
            index_q = self.rope(index_q, *(angle.unsqueeze(-2) for angle in turn_q))

            gain, bias = self.k_norm.weight.to(wide), self.k_norm.bias.to(wide)
            index_k = F.linear(hidden, self.wk.weight.to(dtype)).to(wide)
            index_k = F.layer_norm(index_k, (self.head_dim,), gain, bias, self.k_norm.eps)
            index_k = self.rope(index_k, cos, sin).to(dtype)

            index_weights: Tensor = _WideProduct.apply(asking, self.weights_proj.weight)  # type: ignore[no-untyped-call]
            index_weights = index_weights * (self.num_heads**-0.5 * self.head_dim**-0.5)
        return index_q, index_k, index_weights

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn each pair (a, b) of the first rope_dim dims: (a cos - b sin, b cos + a sin)."""
        out: Tensor = _Rotation.apply(x, cos, sin, self.rope_dim, self.rope_interleaved)  # type: ignore[no-untyped-call]
        return out

    def _check(self, hidden: Tensor, q_residual: Tensor | None, cos: Tensor, sin: Tensor) -> None:
        if hidden.ndim < 1 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"LightningIndexer: hidden must be [..., hidden_size] = [..., {self.hidden_size}], "
                f"got {list(hidden.shape)}"
            )
        lead = hidden.shape[:-1]
        if q_residual is None and self.q_lora_rank is not None:
            raise ValueError(
                f"LightningIndexer: q_residual must be [..., q_lora_rank] = {[*lead, self.q_lora_rank]}, got "
                "None; pass MLA's normed low-rank query, or construct with q_lora_rank=None"
            )
        if q_residual is not None:
            if self.q_lora_rank is None:
                raise ValueError(
                    "LightningIndexer: q_residual must be None because q_lora_rank is None, got "
                    f"{list(q_residual.shape)}; construct with q_lora_rank set to its width"
                )
            if q_residual.shape != (*lead, self.q_lora_rank):
                raise ValueError(
                    "LightningIndexer: q_residual must be [..., q_lora_rank] = "
                    f"{[*lead, self.q_lora_rank]}, got {list(q_residual.shape)}"
                )
            if q_residual.dtype != hidden.dtype:
                raise ValueError(
                    f"LightningIndexer: q_residual must have hidden's dtype {hidden.dtype}, "
                    f"got {q_residual.dtype}; cast one of the two"
                )
        for name, angle in (("cos", cos), ("sin", sin)):
            if not _broadcasts(angle.shape, (*lead, self.rope_dim)):
                raise ValueError(
                    f"LightningIndexer: {name} must be [..., rope_dim] = {[*lead, self.rope_dim]}, leading "
                    f"dims equal or broadcasting, got {list(angle.shape)}"
                )
        for name, tensor in (("hidden", hidden), ("cos", cos), ("sin", sin)):
            if not tensor.is_floating_point():
                raise ValueError(f"LightningIndexer: {name} must be floating point, got {tensor.dtype}")
        placed = {"wk.weight": self.wk.weight, "q_residual": q_residual, "cos": cos, "sin": sin}
        for name, value in placed.items():
            if value is not None and value.device != hidden.device:
                raise ValueError(
                    f"LightningIndexer: {name} must be on hidden's device {hidden.device}, "
                    f"got {value.device}; move the module or its inputs"
                )

    def extra_repr(self) -> str:
        """Sizes and rope layout, for print(module)."""
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"q_lora_rank={self.q_lora_rank}, rope_dim={self.rope_dim}, "
            f"rope_interleaved={self.rope_interleaved}"
        )


def _check_queries(hidden: Tensor, queries: Tensor | None) -> None:
    if queries is None:
        return
    if queries.ndim != 1 or queries.dtype != torch.int64:
        raise ValueError(
            f"LightningIndexer: queries must be int64 [R], got {queries.dtype} {list(queries.shape)}; pass the numbers "
            "of tokens, mask.nonzero()[:, 0] for a mask"
        )
    if hidden.ndim != 2:
        raise ValueError(
            f"LightningIndexer: queries need hidden of [T, hidden_size], got {list(hidden.shape)}; flatten its tokens"
        )


def check_sizes(op: str, **sizes: object) -> None:
    """Raises ValueError for the first of `sizes` that is no positive integer."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{op}: {name} must be a positive integer, got {value!r}; pass a number such as 64")


def no_autocast(device_type: str) -> torch.autocast | nullcontext[None]:
    """Switch autocast off where the device has it; the meta device does not."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether the last dims are equal and shape's leading dims broadcast to target's."""
    if not 1 <= len(shape) <= len(target) or shape[-1] != target[-1]:
        return False
    leading = zip(reversed(shape[:-1]), reversed(target[:-1]), strict=False)
    return all(size in (1, wanted) for size, wanted in leading)
