"""The command `flash-indexer sparse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flash_indexer.commands.shell import console, plain_errors, say_that_imports_take_time, was_typed

app = typer.Typer(add_completion=False)


@app.command()
def sparse(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run: settings, metrics, checkpoint.")],
    init_from: Annotated[
        str, typer.Option(help="Run or native folder of the warmed-up indexers, or a model with some of its own.")
    ] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")] = False,
    model: Annotated[str | None, typer.Option(help="Model; default: the one they were warmed up on.")] = None,
    data: Annotated[str | None, typer.Option(help="Text, JSONL, Parquet or datasets folder.")] = None,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    topk: Annotated[
        int | None, typer.Option(help="Keys K that a query attends to; default 2048, or what the model's config says.")
    ] = None,
    keys: Annotated[
        str, typer.Option(help="indexer, or oracle: the keys of largest attention, a bound to compare with.")
    ] = "indexer",
    layers: Annotated[str | None, typer.Option(help="Layers that become sparse, such as 0,1,5-9; default all.")] = None,
    lora: Annotated[int | None, typer.Option(help="Train adapters of this rank (PEFT), not the parameters.")] = None,
    indexers_alone: Annotated[bool, typer.Option("--indexers-alone", help="Keep the model frozen.")] = False,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a packed sequence; more than K.")] = 4096,
    batch_size: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Micro-batches of an optimizer step.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate of the model or its adapters.")] = 7.3e-6,
    indexer_lr: Annotated[float, typer.Option(help="Learning rate of the indexers.")] = 7.3e-6,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear learning-rate warm-up.")] = 0,
    decay: Annotated[str, typer.Option(help="cosine (to zero) or none.")] = "none",
    clip: Annotated[float, typer.Option(help="Largest norm of the model's gradient; 0: none.")] = 1.0,
    indexer_clip: Annotated[float, typer.Option(help="Largest norm of the indexers' gradient; 0: none.")] = 0.0,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Compute each layer again in the backward.")
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic/--any-order",
            help="The same bits every time, or sums in any order: faster for MLA on Hopper GPUs.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of data order and adapters.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 (float32 masters) or auto (bfloat16 on CUDA).")
    ] = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    cp: Annotated[int, typer.Option("--cp", help="Processes that share each sequence (context parallel).")] = 1,
    tp: Annotated[int, typer.Option("--tp", help="Processes that share the heads of attention.")] = 1,
    cp_layout: Annotated[str, typer.Option(help="zigzag (balanced) or contiguous.")] = "zigzag",
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Shard parameters, gradients and AdamW's state over the processes (FSDP2).")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds without an answer after which a process is given up.")] = 600,
) -> None:
    """Train a model sparsely, each query on K selected keys, and its indexers with it.

    Under torchrun the processes share the data, with --cp each sequence, with --tp attention's heads, with --fsdp the
    model.
    """
    with plain_errors():
        from flash_indexer.recipe.run_record import parse_layers
        from flash_indexer.recipe.sparse_record import (
            SparseRunSettings,
            read_sparse_record,
            refuse_other_sparse_settings,
            sparse_settings_from,
        )

        names = SparseRunSettings.__dataclass_fields__
        values = {name: value for name, value in context.params.items() if name in names}
        values |= dict(layers=parse_layers(layers, "sparse"), clip=clip or None, indexer_clip=indexer_clip or None)
        record = read_sparse_record(out, resume)
        if record is not None:
            values = {**record["settings"], **{name: x for name, x in values.items() if was_typed(context, name)}}
            refuse_other_sparse_settings(record["settings"], values)
        settings = sparse_settings_from(values)

        say_that_imports_take_time()
        from flash_indexer.recipe import judging
        from flash_indexer.recipe.processes import ParallelSettings, is_main_process, leave
        from flash_indexer.recipe.sparse import train_sparsely

        parallel = ParallelSettings(cp=cp, tp=tp, layout=cp_layout, fsdp=fsdp, timeout=timeout, command="sparse")
        train_sparsely(settings, out, resume=resume, console=console, parallel=parallel)
        main = is_main_process()
        leave()
        if main:
            judging.print_path(console, "trained", out / "checkpoint")
