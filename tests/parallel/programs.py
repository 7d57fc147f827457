"""What the processes of `Ranks` run: the same function on every rank, the whole problem made on each."""

from __future__ import annotations

import runpy
import traceback
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flash_indexer.parallel import context as context_module
from flash_indexer.parallel import (
    context_parallel_dsa_attention,
    context_parallel_indexer_kl,
    context_positions,
    gather_tokens,
    tensor_parallel_dsa_attention,
    tensor_parallel_indexer_kl,
)
from flash_indexer.parallel import gradients as gradients_module
from flash_indexer.testing import Inputs, Shape, make_inputs
from flash_indexer.testing.sparse import make_values

PER_TOKEN = ("q", "index_q", "index_weights", "key_start", "key_end", "lse", "token_weight")


def serve(rank: int, world: int, port: int, backend: str, seconds: int, pipe: Connection) -> None:
    """Runs functions of this file by name until told None; answers with (True, result) or (False, traceback)."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world,
        timeout=timedelta(seconds=seconds), device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    groups = make_groups(device)
    while (asked := pipe.recv()) is not None:
        name, arguments = asked
        try:
            pipe.send((True, globals()[name](groups, **arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def make_groups(device: torch.device) -> dict[str, Any]:
    """Groups of the first two ranks and of four, meshes (context, tensor), and this rank's device."""
    world, names = dist.get_world_size(), ("context", "tensor")
    shapes = {"mesh": (2, 2)} if world == 4 else {"1x2": (1, 2), "2x1": (2, 1)}
    meshes = {key: init_device_mesh(device.type, size, mesh_dim_names=names) for key, size in shapes.items()}
    return {"2": dist.new_group([0, 1]), "4": dist.group.WORLD, **meshes, "device": device}


def problem(groups: dict[str, Any], shape: Shape, seed: int, dtype: torch.dtype) -> Inputs:
    """On this rank's device; bfloat16 index vectors in eighths, so that index logits are exact in any order."""
    x = make_inputs(shape, seed=seed, dtype=dtype, device=groups["device"])
    if dtype != torch.bfloat16:
        return x
    index_q, index_k = ((y.float() * 8).round().div(8).to(dtype) for y in (x.index_q, x.index_k))
    return replace(x, index_q=index_q, index_k=index_k)


def shard(x: Inputs, keep: torch.Tensor) -> Inputs:
    """A rank's tokens; as many queries as keys."""
    named = {name: getattr(x, name)[keep] for name in (*PER_TOKEN, "k", "index_k")}
    return replace(x, **named)


def some_heads(x: Inputs, rank: int, world: int) -> Inputs:
    """A rank's teacher heads: whole groups of one key head, or with one key head for all any heads."""
    H, G = x.q.shape[1], x.k.shape[1]
    units = H if G == 1 else G
    bounds = [units * r // world for r in range(world + 1)]
    a, b = (n * H // units for n in bounds[rank : rank + 2])
    k = x.k if G == 1 else x.k[:, bounds[rank] : bounds[rank + 1]]
    return replace(x, q=x.q[:, a:b], k=k, lse=x.lse[:, a:b])


def answer(x: Inputs, function: Any, d_loss: float, wanted: tuple[bool, ...] = (True,) * 3, **options: Any) -> Any:
    """loss, kl, entropy and the gradients of d_loss * loss."""
    leaves = [leaf.clone() for leaf in (x.index_q, x.index_k, x.index_weights)]
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    result = function(
        x.q, x.k, *leaves, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, **options
    )
    if any(wanted):
        (d_loss * result.loss).backward()
    return [value if value is None else value.detach().cpu() for value in (*result, *(leaf.grad for leaf in leaves))]


def given(x: Inputs, lse: bool, weighted: bool, positive: bool = False) -> dict[str, Any]:
    """positive: rows whose weight is negative get none, so that about half of each rank's are left out."""
    weight = x.token_weight.clamp(min=0) if positive else x.token_weight
    return dict(lse=x.lse if lse else None, token_weight=weight if weighted or positive else None)


def context(
    groups: dict[str, Any], *, which: str, layout: str, shape: Shape, seed: int, dtype: torch.dtype, d_loss: float,
    lse: bool = False, weighted: bool = False, wide: bool = False, positive: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Context parallel on group "2" or "4", or with tensor parallel on "mesh"."""
    x = problem(groups, shape, seed, dtype)
    group = groups[which]
    meshed = isinstance(group, DeviceMesh)
    context_group = group.get_group("context") if meshed else group
    world, rank = dist.get_world_size(context_group), dist.get_rank(context_group)
    x = shard(x, context_positions(shape.T, world, rank, layout=layout))
    if meshed:
        heads = group.get_group("tensor")
        x = some_heads(x, dist.get_rank(heads), dist.get_world_size(heads))
    before = context_module.WIDE_BYTES
    context_module.WIDE_BYTES = 0 if wide else before
    try:
        weights = given(x, lse, weighted, positive)
        return answer(x, context_parallel_indexer_kl, d_loss, group=group, layout=layout, **weights, **options)
    finally:
        context_module.WIDE_BYTES = before


def tensor(
    groups: dict[str, Any], *, which: str, shape: Shape, seed: int, dtype: torch.dtype, d_loss: float,
    lse: bool = False, weighted: bool = False, positive: bool = False, **options: Any,
) -> Any:  # fmt: skip
    group = groups[which]
    x = problem(groups, shape, seed, dtype)
    x = some_heads(x, dist.get_rank(group), dist.get_world_size(group))
    return answer(x, tensor_parallel_indexer_kl, d_loss, group=group, **given(x, lse, weighted, positive), **options)


def gather(groups: dict[str, Any], *, which: str, layout: str, length: int) -> Any:
    group = groups[which]
    mine = context_positions(length, dist.get_world_size(group), dist.get_rank(group), layout=layout)
    values = torch.arange(length * 3).view(length, 3)
    return gather_tokens(values[mine], group, layout=layout)


def gather_and_weigh(groups: dict[str, Any], *, which: str, layout: str, length: int) -> Any:
    """The gradient of this rank's rows from sums over all rows, which each rank weighs in another way."""
    group = groups[which]
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = context_positions(length, world, rank, layout=layout)
    x = torch.randn(length, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = x[mine].requires_grad_(True)
    whole = context_module.gather_with_gradient(own, group, layout=layout)
    (rank_weights(length, rank) * whole.sin()).sum().backward()
    return whole.detach(), own.grad, mine, x


def rank_weights(length: int, rank: int) -> torch.Tensor:
    return torch.arange(length * 3, dtype=torch.float64).view(length, 3) + 100 * rank


def sum_of_some_gradients(groups: dict[str, Any], *, bucket: int) -> Any:
    """Parameters of 2, 5, 3 and 1 numbers: the second has a gradient on rank 1 alone, the last on no rank."""
    rank, gradients = dist.get_rank(), gradients_module
    parameters = [torch.zeros(n, requires_grad=True) for n in (2, 5, 3, 1)]
    for n, parameter in enumerate(parameters[:3]):
        if n != 1 or rank == 1:
            parameter.grad = torch.full_like(parameter, n + 1.0 + 10 * rank)
    before, gradients.BUCKET = gradients.BUCKET, bucket
    try:
        gradients.complete_gradients(parameters)
        gradients.sum_gradients(parameters)
    finally:
        gradients.BUCKET = before
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


def padded(groups: dict[str, Any], *, which: str, layout: str, shape: Shape, seed: int, length: int) -> Any:
    """A sequence that doesn't divide, padded to `length` with tokens that see nothing."""
    group, x = groups[which], make_inputs(shape, seed=seed, dtype=torch.float64)
    extra = length - shape.T
    named = {name: getattr(x, name) for name in (*PER_TOKEN, "k", "index_k")}
    named = {name: torch.cat([y, y[:1].expand(extra, *y.shape[1:])]) for name, y in named.items()}
    named["key_start"][shape.T :] = named["key_end"][shape.T :] = x.key_end[-1]
    x = shard(
        replace(x, **named),
        context_positions(length, dist.get_world_size(group), dist.get_rank(group), layout=layout),
    )
    return answer(x, context_parallel_indexer_kl, 1.0, group=group, layout=layout)


def some_rows(groups: dict[str, Any], *, which: str, layout: str, shape: Shape, seed: int, of: int) -> Any:
    """Each rank hands over its first `of` · rank queries alone, the first rank none, and all its keys."""
    group, x = groups[which], make_inputs(shape, seed=seed, dtype=torch.float64)
    rank = dist.get_rank(group)
    x = shard(x, context_positions(shape.T, dist.get_world_size(group), rank, layout=layout))
    x = replace(x, **{name: getattr(x, name)[: of * rank] for name in PER_TOKEN})
    return answer(x, context_parallel_indexer_kl, 1.0, group=group, layout=layout, token_weight=x.token_weight)


def blind(groups: dict[str, Any], *, which: str, function: str) -> Any:
    """No query of any rank sees a key."""
    x = make_inputs(Shape(((8, 8),), H=2, G=1, D=8, I=2, E=32), seed=0, dtype=torch.float64)
    x = replace(x, key_end=x.key_start)
    return answer(x, FUNCTIONS[function], 1.0, group=groups[which])


def under_autocast(groups: dict[str, Any], *, which: str, function: str) -> Any:
    """What autocast to bfloat16 changes: nothing."""
    x = make_inputs(Shape(((8, 8),), H=2, G=1, D=8, I=2, E=32), seed=0)
    plain = answer(x, FUNCTIONS[function], 1.0, group=groups[which])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plain, answer(x, FUNCTIONS[function], 1.0, group=groups[which])


def without_gradients(
    groups: dict[str, Any], *, which: str, function: str, wanted: tuple[bool, ...], dtype: torch.dtype = torch.float64
) -> Any:
    x = problem(groups, Shape(((8, 8),), H=2, G=1, D=64, I=2, E=32), 0, dtype)
    return answer(x, FUNCTIONS[function], 1.0, wanted, group=groups[which])


def again(groups: dict[str, Any], *, which: str, function: str) -> list[str]:
    """What a second backward, and one with create_graph, are told."""
    x = make_inputs(Shape(((8, 8),), H=2, G=1, D=8, I=2, E=32), seed=0, dtype=torch.float64)
    told = []
    for graph in (False, True):
        leaf = x.index_q.clone().requires_grad_()
        loss = FUNCTIONS[function](
            x.q, x.k, leaf, x.index_k, x.index_weights, softmax_scale=x.softmax_scale, key_start=x.key_start,
            key_end=x.key_end, group=groups[which],
        ).loss  # fmt: skip
        try:
            loss.backward(create_graph=graph, retain_graph=True)
            loss.backward()
        except RuntimeError as error:
            told.append(str(error))
    return told


def refused(groups: dict[str, Any], *, which: str, function: str, rows: int = 8, **options: Any) -> str:
    """What a bad call is told; which: a key of groups, or anything else to pass it as it is."""
    x = make_inputs(Shape(((rows, rows),), H=2, G=1, D=8, I=2, E=32), seed=0, dtype=torch.float64)
    try:
        answer(x, FUNCTIONS[function], 1.0, group=groups.get(which, which), **options)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sparse(
    groups: dict[str, Any], *, which: str, layout: str | None, shape: Shape, seed: int, dtype: torch.dtype, V: int,
    d_loss: float, weighted: bool, mode: str, wanted: tuple[bool, ...] = (True,) * 6, **options: Any,
) -> dict[str, torch.Tensor | None]:  # fmt: skip
    """dsa_attention, context parallel with a layout (on "mesh" tensor parallel too), tensor parallel without.

    V negative: the values are the first -V columns of k. Upstream of out: what every process draws for all tokens and
    heads, this rank's part of it. d_loss: the upstream gradient of the loss, or kl_scale.
    """
    x, group = problem(groups, shape, seed, dtype), groups[which]
    generator = torch.Generator().manual_seed(seed + 2)
    d_out = torch.randn(shape.T, shape.H, abs(V), generator=generator, dtype=torch.float64).to(dtype).to(x.q.device)
    v = None if V < 0 else make_values(x, V, seed=seed + 1)
    heads = group.get_group("tensor") if isinstance(group, DeviceMesh) else None if layout else group
    if layout:
        context_group = group.get_group("context") if isinstance(group, DeviceMesh) else group
        keep = context_positions(
            shape.T, dist.get_world_size(context_group), dist.get_rank(context_group), layout=layout
        )
        x, d_out, v = shard(x, keep), d_out[keep], None if v is None else v[keep]
        options["layout"] = layout
    if heads is not None:
        rank, world = dist.get_rank(heads), dist.get_world_size(heads)
        d_out = some_heads(replace(x, q=d_out), rank, world).q
        v = v if v is None or shape.G == 1 else some_heads(replace(x, k=v), rank, world).k
        x = some_heads(x, rank, world)
    inputs = [x.q, x.k, v, x.index_q, x.index_k, x.index_weights]
    leaves = [None if y is None else y.clone().requires_grad_(w) for y, w in zip(inputs, wanted, strict=True)]
    if mode == "backward":
        scale = torch.tensor(d_loss, dtype=torch.float64, device=x.q.device)
        options |= dict(kl=mode, kl_scale=scale, kl_out=x.index_weights.new_zeros(len(x.q)))
    function = context_parallel_dsa_attention if layout else tensor_parallel_dsa_attention
    result = function(
        *leaves, group=group, softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end,
        token_weight=x.token_weight if weighted else None, value_dim=-V if V < 0 else None, **options,
    )  # fmt: skip
    if result.out.requires_grad:
        result.out.backward(d_out)
    if result.loss is not None and result.loss.requires_grad:
        (d_loss * result.loss).backward()
    names = ("dq", "dk", "dv", "d_index_q", "d_index_k", "d_index_weights")
    grads = {name: None if y is None else y.grad for name, y in zip(names, leaves, strict=True)}
    made = dict(out=result.out, lse=result.lse, loss=result.loss, kl=result.kl, **result.selection._asdict(), **grads)
    return {name: y if y is None else y.detach().cpu() for name, y in made.items()}


def small_sparse(groups: dict[str, Any], which: str, function: str, rows: int = 8, **options: Any) -> Any:
    """A call on each rank's own small problem; which: a key of groups, or anything else to pass it as it is."""
    x = make_inputs(Shape(((rows, rows),), H=2, G=1, D=8, I=2, E=8), seed=0, dtype=torch.float64)
    call = {"context": context_parallel_dsa_attention, "tensor": tensor_parallel_dsa_attention}[function]
    fixed = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end, topk=3)
    index = x.index_q.requires_grad_(), x.index_k, x.index_weights
    return call(x.q.requires_grad_(), x.k, x.k, *index, group=groups.get(which, which), **(fixed | options))


def refused_sparse(groups: dict[str, Any], **arguments: Any) -> str:
    """What a bad call is told."""
    try:
        small_sparse(groups, **arguments)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def again_sparse(groups: dict[str, Any], *, which: str, function: str) -> list[str]:
    """What a second backward that would count the KL twice, and one with create_graph, are told; one more is fine."""
    told = []
    for options in (dict(retain_graph=True), dict(create_graph=True)):
        out = small_sparse(groups, which, function, kl="backward").out
        try:
            out.sum().backward(**options)
            out.sum().backward()
        except RuntimeError as error:
            told.append(str(error))
    out = small_sparse(groups, which, function).out
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    return told


FUNCTIONS = {"context": context_parallel_indexer_kl, "tensor": tensor_parallel_indexer_kl}


def megatron(groups: dict[str, Any], *, which: str, tensors: list[torch.Tensor], **options: Any) -> Any:
    """The adapter's loss and gradients, the heads of the query shared out."""
    from flash_indexer.models.megatron import dsa_indexer_loss

    group = groups[which]
    query = tensors[0].chunk(dist.get_world_size(group), 2)[dist.get_rank(group)]
    leaves = [x.clone().requires_grad_() for x in tensors[2:]]
    loss = dsa_indexer_loss(query, tensors[1], *leaves, tensor_group=group, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def benchmark(groups: dict[str, Any], *, path: str, wrong: str) -> Any:
    """The benchmark's record of its tiny size, or what it ends with where `wrong` of one rank's result is wrong."""
    bench = SimpleNamespace(**runpy.run_path(path))
    inner = bench.shard

    def broken(whole: Any, way: str) -> Any:
        part = inner(whole, way)
        step = part.step

        def wrongly() -> list[torch.Tensor]:
            values = step()
            if dist.get_rank() == 1 and wrong:
                values[("loss", "kl", "d_index_q", "d_index_k", "d_index_weights").index(wrong)] *= 1.01
            return values

        part.step = wrongly
        return part

    bench.measure.__globals__["shard"] = broken
    try:
        return bench.measure(bench.SIZES["tiny"], ["context", "contiguous", "tensor"], 2, groups["device"])
    except SystemExit as error:
        return str(error)
