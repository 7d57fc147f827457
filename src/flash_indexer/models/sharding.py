"""A model shared out over processes: heads and MLP columns by tensor parallelism, every parameter by FSDP2.

Tensor parallelism is for a frozen model; FSDP2 also shares out one that trains, with its gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from flash_indexer.models.families import FAMILIES, config_value, find_decoder, has_head_projections
from flash_indexer.models.layers import decoder_blocks, decoder_layers
from flash_indexer.models.own_indexers import has_own_indexers, own_indexer
from flash_indexer.parallel.mesh import Parallel

_COLUMNS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")
"""Projections whose outputs are heads; MLA's latents (q_a_proj, kv_a_proj_with_mqa) stay whole on every process."""
_WHOLE_HEADS = ("q_gate_proj", "g_proj", "gate_proj", "sinks", "softmax_scaling")
"""What attentions of A.X-K2, Dots 3 Note, Hy4 and Mistral Large 4 have for each head beside these."""


def shard_model(model: PreTrainedModel, parallel: Parallel, *, fsdp: bool) -> None:
    """Shares a frozen model's parameters out, in place, before `attach`. Every process calls it on the same weights.

    tp > 1: attention heads and the columns of dense MLPs over the tp processes; experts stay whole.
    fsdp: each decoder layer, and what is left but indexers of the model's own, over all processes (with tp > 1: over
        the dp · cp processes with its heads). A layer's parameters are gathered for its forward alone. CPU weights
        move to their GPU layer by layer.

    Raises:
        ValueError: the heads can't be divided by tp, tp leaves fsdp no processes to share parameters out over, or the
            model is of no family that `attach` knows.
    """
    decoder: Any = find_decoder(model)
    found, blocks = decoder_layers(decoder, model.config.get_text_config()), decoder_blocks(decoder)
    if not found.attentions and not has_own_indexers(found):
        raise ValueError(f"shard_model: model must be one of the {FAMILIES}; got {type(model).__name__}")
    if parallel.tp > 1 and not all(has_head_projections(getattr(block, "self_attn", None)) for block in blocks):
        raise ValueError(
            "shard_model: tp must be 1 unless every layer has a self_attn with q/k/v projections or MLA, got "
            f"tp={parallel.tp} for {type(model).__name__}; share it out by FSDP and context parallelism"
        )
    if fsdp and parallel.tp == parallel.world > 1:
        raise ValueError(
            f"shard_model: fsdp shares parameters out over dp * cp processes, got 1 with tp={parallel.tp}; start more "
            "processes, or leave fsdp out"
        )
    if parallel.tp > 1:
        config = model.config.get_text_config()
        _check_parts(blocks, parallel.tp)
        check_heads("shard_model", config, parallel.tp)
        assert parallel.mesh is not None
        for block in blocks:
            parallelize_module(block, parallel.mesh["tp"], _plan(block, _has_one_key(config)))
    if fsdp and parallel.mesh is not None:
        mesh = _everyone(parallel.mesh) if parallel.tp == 1 else _beside_tp(parallel.mesh)
        _fully_shard(model, decoder, blocks, mesh)


def shard_for_training(root: nn.Module, model: PreTrainedModel, parallel: Parallel) -> None:
    """Shares the parameters of a model that trains out over all processes, in place, before `attach`.

    Each decoder layer is gathered while it runs, forwards and backwards, and all else while `root` does. A gradient is
    the sum over processes of their gradients, of which each process keeps its shard: so the sum of the processes'
    losses is what trains. CPU weights move to their GPU layer by layer.

    Args:
        root: whose forward runs the decoder and the output layer of `model`.
    """
    assert parallel.mesh is not None
    mesh = _everyone(parallel.mesh)
    trains = any(parameter.requires_grad for parameter in model.parameters())
    for block in decoder_blocks(find_decoder(model)):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, reshard_after_forward=not trains)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo multiplies nowhere
            if hasattr(module, "set_reduce_scatter_unused_params"):  # torch 2.13: experts that got no tokens here
                module.set_reduce_scatter_unused_params(True)


def _everyone(mesh: DeviceMesh) -> DeviceMesh:
    everyone: Any = dist.group.WORLD
    return DeviceMesh.from_group(everyone, mesh.device_type)


def _beside_tp(mesh: DeviceMesh) -> DeviceMesh:
    """The processes with this one's heads: a part of the mesh that tp is a part of, as FSDP2 requires."""
    return mesh["dp", "cp"]._flatten("dp_cp")


def check_heads(op: str, config: Any, tp: int) -> None:
    """Raises ValueError where tp processes can't share the heads of query and key out. One key head is on each."""
    heads = [("num_attention_heads", count) for count in _counts(config, "num_attention_heads")]
    heads += [("num_key_value_heads", count) for count in _counts(config, "num_key_value_heads") if count > 1]
    for name, count in heads:
        if count % tp:
            possible = [n for n in range(1, count + 1) if all(x % n == 0 for _, x in heads)]
            raise ValueError(f"{op}: tp must divide {name} = {count}, got tp={tp}; possible here: {possible}")


def _counts(config: Any, name: str) -> list[int]:
    """Of a config's layers, where it has the value at all."""
    found = config_value(config, name)
    return [count for count in (found if isinstance(found, list) else [found]) if count is not None]


def _check_parts(blocks: list[nn.Module], tp: int) -> None:
    for layer, block in enumerate(blocks):
        attention: Any = getattr(block, "self_attn", None)
        if name := next((name for name in _WHOLE_HEADS if hasattr(attention, name)), None):
            raise ValueError(
                f"shard_model: tp must be 1 for {type(attention).__name__}, got tp={tp}: {name} of layer {layer} has a "
                "part for each head, which is not shared out; use cp or fsdp"
            )


def _has_one_key(config: Any) -> bool:
    """Multi-query attention, whose one key head every process holds."""
    return getattr(config, "kv_lora_rank", None) is None and set(_counts(config, "num_key_value_heads")) == {1}


def _plan(block: nn.Module, one_key: bool) -> dict[str, Any]:
    plan: dict[str, Any] = {"self_attn.o_proj": RowwiseParallel()}
    names = [f"self_attn.{name}" for name in _COLUMNS if not (one_key and name in ("k_proj", "v_proj"))]
    mlp = getattr(block, "mlp", None)
    if all(isinstance(getattr(mlp, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        plan["mlp.down_proj"] = RowwiseParallel()
        names += ["mlp.gate_proj", "mlp.up_proj"]
    present = dict(block.named_modules())
    return plan | {name: ColwiseParallel() for name in names if present.get(name) is not None}


def _fully_shard(model: PreTrainedModel, decoder: Any, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """The decoder is a root of its own, since the recipe runs it without the head; a tied head follows it."""
    tied = {id(parameter): name for name, parameter in decoder.named_parameters()}
    whole = _own_indexers(blocks, mesh)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    beside = [(owner, name, tied[id(p)]) for owner, name, p in _outside(model, decoder) if id(p) in tied]
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for owner, name, inside in beside:
        setattr(owner, name, decoder.get_parameter(inside))
    alone = {
        id(owner): owner for owner, _, p in _outside(model, decoder) if not any(p is q for q in decoder.parameters())
    }
    for owner in alone.values():
        fully_shard(owner, mesh=mesh, reshard_after_forward=True)


def _own_indexers(blocks: list[nn.Module], mesh: DeviceMesh) -> set[nn.Parameter]:
    """Parameters of indexers that the model has of its own, which train and are on every process, whole."""
    cpu = mesh.device_type == "cpu"
    device = torch.device("cpu") if cpu else torch.device(mesh.device_type, torch.cuda.current_device())
    own = [own_indexer(getattr(block, "self_attn", None)) for block in blocks]
    return {parameter for module in own if module is not None for parameter in module.to(device).parameters()}


def _outside(model: nn.Module, decoder: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Modules outside of the decoder, with the names and values of their own parameters."""
    inside = {id(module) for module in decoder.modules()}
    return [
        (module, name, parameter)
        for module in model.modules()
        if id(module) not in inside
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
