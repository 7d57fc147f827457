"""The public dsa_attention, its KL beside the attention or in its backward: values, gradients, what counts once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_indexer import DSAAttention, dsa_attention, sparse_attention
from flash_indexer.ops import SparseSettings, recomputed_attention
from flash_indexer.ops.sparse import torch_attention, torch_index, torch_select
from flash_indexer.testing import SHAPES

D_LOSS = -1.7
MODES = ("forward", "selects again", "backward", "backward, selects again")
GRADIENTS = ("dq", "dk", "dv", "d_index_q", "d_index_k", "d_index_weights")


def call(case: Any, tensors: list[Tensor | None], **options: Any) -> DSAAttention:
    fixed = dict(softmax_scale=case.x.softmax_scale, value_dim=case.value_dim, topk=case.topk, **case.intervals)
    return dsa_attention(*tensors, **(fixed | options))


def step(case: Any, tensors: list[Tensor | None], mode: str, **options: Any) -> dict[str, Tensor]:
    """Forward and backward: loss, where there is one, and kl; the KL's gradients are those of D_LOSS times it."""
    options = dict(save_selection="again" not in mode) | options
    if not mode.startswith("backward"):
        result = call(case, tensors, **options)
        torch.autograd.backward([result.out, D_LOSS * result.loss], [case.d_out, torch.ones_like(result.loss)])
        made = dict(loss=result.loss.detach(), kl=result.kl)
    else:
        kl, scale = torch.zeros(len(case.x.q), dtype=case.x.q.dtype), torch.tensor(D_LOSS, dtype=torch.float64)
        result = call(case, tensors, kl="backward", kl_out=kl, kl_scale=scale, **options)
        assert result.loss is None and result.kl is kl and kl.isnan().all()
        result.out.backward(case.d_out)
        made = dict(kl=kl)
    return dict(out=result.out.detach(), lse=result.lse, **made)


def measure(case: Any, mode: str, **options: Any) -> dict[str, Tensor | None]:
    tensors = case.tensors()
    made = step(case, tensors, mode, **options)
    grads = [None if x is None else x.grad for x in tensors]
    return made | dict(zip(GRADIENTS, grads, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(make_case: Callable[..., Any], shape: str, dtype: torch.dtype, mode: str) -> None:
    """In float64 with many chunks or some, and with one; in float32 at one of these sizes: which one, goes around."""
    sizes = ((7, 3000, 5), (7, 30_000, -4), (500, 2**29, 5))
    turn = list(SHAPES).index(shape) + MODES.index(mode)
    for topk, workspace_bytes, V in (sizes[turn % 2], sizes[2]) if dtype == torch.float64 else (sizes[turn % 3],):
        case = make_case(shape, dtype=dtype, topk=topk, V=V)
        weight = case.x.token_weight if V > 0 else None
        case.judge(measure(case, mode, workspace_bytes=workspace_bytes, token_weight=weight), token_weight=weight)


@pytest.mark.parametrize("mode", MODES)
def test_keys_that_are_always_there(make_case: Callable[..., Any], mode: str) -> None:
    for always in ((2, 3), (4, 3)):
        case = make_case("packed", always=always, topk=7)
        case.judge(measure(case, mode, always=always))


@pytest.mark.parametrize("mode", MODES)
def test_one_query_one_key_and_none(make_case: Callable[..., Any], mode: str) -> None:
    for document in ((1, 1), (1, 5), (5, 1)):
        case = make_case("one_head", documents=(document,), topk=3)
        case.judge(measure(case, mode))
    nothing = measure(make_case("one_head", documents=((3, 0),), topk=3), mode)
    assert bool((nothing.pop("lse") == -torch.inf).all()) and all(bool((x == 0).all()) for x in nothing.values())


def test_an_indexer_that_ranks_the_true_mass_last(make_case: Callable[..., Any]) -> None:
    """A dense-looking result would be found out here: T > K, and what is selected away is what matters."""
    case = make_case("smollm2", topk=5)
    tensors = case.tensors()
    result = call(case, tensors)
    dense = call(case, tensors, topk=len(case.x.k))
    far = case.selection.count < torch.arange(1, len(case.x.q) + 1)
    assert far.sum() > 50 and bool(((result.out - dense.out).abs().amax((1, 2)) > 1e-3)[far].all())
    assert bool((result.lse < dense.lse)[far].all())


def test_who_gets_gradients(make_case: Callable[..., Any]) -> None:
    """The model those of out alone, the indexer those of the KL alone."""
    case = make_case("packed")
    tensors = case.tensors()
    result = call(case, tensors)
    result.loss.backward(retain_graph=True)
    assert [x.grad is not None for x in tensors] == [False] * 3 + [True] * 3
    tensors = case.tensors()
    call(case, tensors).out.backward(case.d_out)
    assert [x.grad is not None for x in tensors] == [True] * 3 + [False] * 3
    tensors = case.tensors()
    call(case, tensors, save_selection=False).out.backward(case.d_out)
    assert [x.grad is not None for x in tensors] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "needs", [tuple(n > bit for bit in (0, 1)) * 3 for n in range(3)] + list(product([0, 1], repeat=6))[1::5]
)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_subsets_of_gradients(make_case: Callable[..., Any], mode: str, needs: tuple[bool, ...]) -> None:
    case = make_case("cached_prefix")
    whole, tensors = measure(case, mode), case.tensors(tuple(map(bool, needs)))
    if mode == "backward":
        result = call(case, tensors, kl="backward", kl_scale=torch.tensor(D_LOSS, dtype=torch.float64))
        assert result.out.requires_grad == any(needs) and result.kl is None
        if any(needs):
            result.out.backward(case.d_out)
    else:
        result = call(case, tensors)
        assert (result.out.requires_grad, result.loss.requires_grad) == (any(needs[:3]), any(needs[3:]))
        for value, upstream in ((result.out, case.d_out), (result.loss, torch.tensor(D_LOSS, dtype=torch.float64))):
            if value.requires_grad:
                value.backward(upstream)
    for x, need, name in zip(tensors, needs, GRADIENTS, strict=True):
        assert (x.grad is not None) == bool(need)
        if need:
            torch.testing.assert_close(x.grad, whole[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_accumulate(make_case: Callable[..., Any], mode: str) -> None:
    case = make_case("packed")
    once, tensors = measure(case, mode), case.tensors()
    for _ in range(2):
        step(case, tensors, mode)
    for x, name in zip(tensors, GRADIENTS, strict=True):
        torch.testing.assert_close(x.grad, 2 * once[name])


def test_p_is_formed_once_in_backward_and_twice_in_forward(
    make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And selection runs again only where it was not saved."""
    ran: list[str] = []
    for module, name in (
        (torch_attention, "target"),
        (torch_attention, "backward"),
        (torch_select, "select"),
        (torch_index, "kl_rows"),
    ):
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, inner=inner, name=name: ran.append(name) or inner(*x))
    expected = {
        "forward": ["select", "target", "kl_rows", "backward"],
        "selects again": ["select", "target", "kl_rows", "select", "backward"],
        "backward": ["select", "backward", "kl_rows"],
        "backward, selects again": ["select", "select", "backward", "kl_rows"],
    }
    for mode in MODES:
        ran.clear()
        measure(make_case("packed"), mode)
        assert ran[1:] == expected[mode], mode  # the first selection is make_case's


def test_selecting_again_keeps_no_selection(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    slots = case.selection.indices.numel()
    for mode in ("forward", "backward"):
        kept = []
        for saved in (True, False):
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
            ):
                call(case, case.tensors(), kl=mode, save_selection=saved)
            kept.append(sizes.count(slots))
        assert kept == [2, 0], mode


def test_settings_of_some_queries_with_a_known_selection(
    make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of rows that are given their selection select nothing, and add up to the whole."""
    case = make_case("packed")
    expected = measure(case, "backward", token_weight=case.x.token_weight)
    tensors, kl = case.tensors(), torch.zeros(len(case.x.q), dtype=case.x.q.dtype)
    start, end = case.intervals["key_start"], case.intervals["key_end"]
    whole = SparseSettings(
        case.x.softmax_scale, start, end, case.topk, case.value_dim, (0, 0), case.x.token_weight, "backward",
        torch.tensor(D_LOSS, dtype=torch.float64), kl, True, True, selection=case.selection,
    )  # fmt: skip
    monkeypatch.setattr(torch_select, "select", None)
    q, k, v, index_q, index_k, weights = tensors
    for rows in (slice(0, 40), slice(40, 91)):
        some, leaves = q[rows], (index_q[rows], index_k, weights[rows])
        settings = whole.rows(rows).checked("a test", some, k, v, leaves)
        out, _, chosen = recomputed_attention(settings, some, k, v, None, leaves)
        assert torch.equal(chosen.indices, case.selection.indices[rows])
        out.backward(case.d_out[rows])
    found = dict(zip(GRADIENTS, [None if x is None else x.grad for x in tensors], strict=True)) | dict(kl=kl)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_selection_of_other_queries_is_refused(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    q, k, v, *leaves = case.tensors()
    start, end = case.intervals["key_start"], case.intervals["key_end"]
    settings = SparseSettings(
        1.0, start, end, 7, None, (0, 0), None, "forward", None, None, True, True,
        selection=case.selection.rows(slice(90)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"selection must be of the T = 91 queries, got one of 90; take the rows"):
        settings.checked("a test", q, k, v, tuple(leaves))


def test_a_second_backward_is_refused_and_no_kl_is_counted_twice(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    tensors = case.tensors()
    out = call(case, tensors, kl="backward").out
    out.backward(case.d_out, retain_graph=True)
    once = [x.grad.clone() for x in tensors]
    with pytest.raises(RuntimeError, match='dsa_attention: backward already ran and with kl="backward" a second one'):
        out.backward(case.d_out)
    assert all(torch.equal(x.grad, y) for x, y in zip(tensors, once, strict=True))
    for mode in ("forward", "backward"):
        with pytest.raises(RuntimeError, match="the output has no second derivative"):
            torch.autograd.grad(call(case, tensors, kl=mode).out.sum(), tensors[0], create_graph=True)
    tensors = case.tensors()
    again = call(case, tensors, save_selection=False).out  # without a KL to count, twice is fine
    again.backward(case.d_out, retain_graph=True)
    again.backward(case.d_out)


def test_kl_scale_is_read_when_backward_runs(make_case: Callable[..., Any]) -> None:
    case = make_case("packed")
    plain, scale, kl = measure(case, "backward"), torch.tensor(1.0), torch.empty(91, dtype=torch.float64)
    tensors = case.tensors()
    out = call(case, tensors, kl="backward", kl_scale=scale, kl_out=kl).out
    scale.fill_(2 * D_LOSS)
    out.backward(case.d_out)
    assert torch.equal(kl, plain["kl"])
    for x, name, factor in zip(tensors, GRADIENTS, (1, 1, 1, 2, 2, 2), strict=True):
        torch.testing.assert_close(x.grad, factor * plain[name])


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_a_gradient_scaler(make_case: Callable[..., Any], mode: str) -> None:
    """The scaled step's gradients, unscaled, are the plain step's."""
    case = make_case("packed", dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plain, tensors = measure(case, mode), case.tensors()
    optimizer = torch.optim.SGD([x for x in tensors if x is not None], lr=0.0)
    factor = scaler.scale(torch.tensor(1.0))
    if mode == "backward":
        result = call(case, tensors, kl="backward", kl_scale=factor * D_LOSS)
        scaler.scale((result.out * case.d_out).sum()).backward()
    else:
        result = call(case, tensors)
        scaler.scale((result.out * case.d_out).sum() + D_LOSS * result.loss).backward()
    scaler.unscale_(optimizer)
    for x, name in zip(tensors, GRADIENTS, strict=True):
        torch.testing.assert_close(x.grad, plain[name], rtol=1e-5, atol=1e-6)


class Layers(nn.Module):
    """Two layers of attention on one stream, each with an indexer that reads the detached stream."""

    def __init__(self, case: Any, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.case, self.mode, width = case, mode, case.x.q[0].numel()
        maps = (
            width,
            case.x.k[0].numel(),
            case.v[0].numel(),
            case.x.index_q[0].numel(),
            case.x.index_k.shape[1],
            case.x.index_weights.shape[1],
        )
        self.maps = nn.ModuleList(
            nn.ModuleList(nn.Linear(16, n, bias=False, dtype=torch.float64) for n in maps) for _ in range(2)
        )
        self.back = nn.ModuleList(
            nn.Linear(case.d_out[0].numel(), 16, bias=False, dtype=torch.float64) for _ in range(2)
        )
        self.kl = [torch.zeros(len(case.x.q), dtype=torch.float64) for _ in range(2)]

    def layer(self, n: int, x: Tensor) -> tuple[Tensor, Tensor]:
        like = (self.case.x.q, self.case.x.k, self.case.v, *self.case.index)
        streams = [x] * 3 + [x.detach()] * 3
        made = [linear(y).view(z.shape) for linear, y, z in zip(self.maps[n], streams, like, strict=True)]
        options = (
            dict(kl="backward", kl_scale=torch.tensor(D_LOSS, dtype=torch.float64), kl_out=self.kl[n])
            if self.mode == "backward"
            else {}
        )
        result = call(self.case, made, **options)
        loss = x.new_zeros(()) if result.loss is None else D_LOSS * result.loss
        return x + self.back[n](result.out.flatten(1)), loss

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, first = self.layer(0, x)
        x, second = self.layer(1, x)
        return x, first + second

    def gradients(self, run: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        self.zero_grad()
        x = torch.randn(len(self.case.x.q), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        out, loss = run(self.both, x.requires_grad_())
        (out.sin().sum() + loss).backward()
        return [p.grad.clone() for p in self.parameters()] + [x.grad, *(kl.clone() for kl in self.kl)]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_activation_checkpointing_counts_each_layers_kl_once(
    make_case: Callable[..., Any], mode: str, reentrant: bool
) -> None:
    layers = Layers(make_case("smollm2", H=3, I=2, D=8, E=8, V=4), mode)
    plain = layers.gradients(lambda run, x: run(x))
    again = layers.gradients(lambda run, x: checkpoint(run, x, use_reentrant=reentrant))
    assert len(plain) == 2 * 7 + 3 and all(x.abs().max() > 0 for x in plain[:15])
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)
    alone = layers.gradients(lambda run, x: run(x))
    assert all(torch.equal(a, b) for a, b in zip(alone, plain, strict=True))


def test_compiled(make_case: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    case = make_case("packed")

    def run(tensors: list[Tensor], start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        result = dsa_attention(*tensors, softmax_scale=0.3, key_start=start, key_end=end, topk=7, always=(1, 2))
        return result.out.sin(), D_LOSS * result.loss

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        tensors = case.tensors()
        out, loss = function(tensors, *case.intervals.values())
        torch.autograd.backward([out, loss], [case.d_out, torch.ones_like(loss)])
        results.append((out.detach(), loss.detach(), *(x.grad for x in tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [dict(kl="backward"), dict(save_selection=False)])
def test_what_can_not_be_compiled_says_so(make_case: Callable[..., Any], options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    case = make_case("packed")
    with pytest.raises(Exception, match="can not be compiled"):
        torch.compile(lambda: call(case, case.tensors(), **options).out, backend="eager", fullgraph=True)()


def test_gradcheck_of_attention(make_case: Callable[..., Any]) -> None:
    """Through out; the other way is sparse_attention's, and through the loss sparse_indexer_kl's with its arguments."""
    case = make_case("packed", documents=((1, 1), (3, 4)), H=2, G=1, D=3, V=2, topk=2)
    index = case.tensors()[3:]
    assert torch.autograd.gradcheck(
        lambda *x: call(case, [*x, *index], save_selection=False).out, case.tensors()[:3], eps=1e-6
    )


def test_nothing_is_learnt_without_a_gradient_of_out(make_case: Callable[..., Any]) -> None:
    case, kl = make_case("packed"), torch.zeros(91, dtype=torch.float64)
    with torch.no_grad():
        result = call(case, case.tensors(), kl="backward", kl_out=kl)
    assert not result.out.requires_grad and kl.isnan().all()
    expected = sparse_attention(case.x.q, case.x.k, case.v, case.selection, softmax_scale=case.x.softmax_scale)
    assert torch.equal(result.out, expected.out) and torch.equal(result.lse, expected.lse)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(kl="both"), ValueError, "dsa_attention: kl must be 'forward' or 'backward', got 'both'"),
        (dict(kl_scale=torch.tensor(1.0)), ValueError, 'kl_scale must be None with kl="forward"'),
        (dict(kl_out=torch.zeros(91)), ValueError, 'kl_out must be None with kl="forward"'),
        (dict(kl="backward", kl_out=torch.zeros(90)), ValueError, r"kl_out must be \[T\] = \[91\], got \[90\]"),
        (dict(kl="backward", kl_out=torch.zeros(91).int()), ValueError, "kl_out must be floating point"),
        (dict(kl="backward", kl_scale=torch.zeros(1)), ValueError, r"kl_scale must be a scalar \[\]"),
        (dict(kl="backward", kl_scale=2.0), TypeError, "kl_scale must be a tensor, got float"),
        (dict(kl="backward", kl_scale=torch.zeros((), requires_grad=True)), ValueError, "without requires_grad"),
        (dict(topk=0), ValueError, "topk must be at least 1"),
        (dict(topk=3, always=(2, 2)), ValueError, "always must hold at most topk = 3 keys together"),
        (dict(value_dim=3), ValueError, "value_dim must be None where v is given"),
        (dict(token_weight=torch.zeros(91)), TypeError, "token_weight must be torch.float64 like q"),
        (dict(token_weight=torch.zeros(91, requires_grad=True).double()), ValueError, "token_weight is a constant"),
        (dict(key_start=torch.zeros(91)), TypeError, "key_start must be int32"),
        (dict(workspace_bytes=1.5), TypeError, "workspace_bytes must be an integer"),
        (dict(softmax_scale=-2.0), ValueError, "softmax_scale must be positive"),
    ],
)
def test_refusals(make_case: Callable[..., Any], options: dict[str, Any], error: type[Exception], message: str) -> None:
    case = make_case("packed")
    with pytest.raises(error, match=message):
        call(case, case.tensors(), **options)
