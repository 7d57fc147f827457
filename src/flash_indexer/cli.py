"""The command line. Each command calls the library and prints where things are.

Commands import what they call, so that `--help` needs no torch.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flash_indexer.commands.shell import Queries, console, plain_errors, say_that_imports_take_time, was_typed
from flash_indexer.commands.sparse import app as sparse_app

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Train and judge lightning indexers (DeepSeek Sparse Attention) for dense models.",
)  # fmt: skip

Out = Annotated[Path, typer.Option(help="Folder of the run: settings, metrics, checkpoint, report.")]
Run = Annotated[Path, typer.Option("--run", "--out", help="Folder of a run, or of a native indexer.")]


@app.callback()
def _options() -> None:
    """Train and judge lightning indexers (DeepSeek Sparse Attention) for dense models."""


@app.command()
def warmup(
    context: typer.Context,
    out: Out,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, if there is one.")] = False,
    model: Annotated[str, typer.Option(help="Local Transformers checkpoint, or the embedded one.")] = "smollm2-135m",
    data: Annotated[str | None, typer.Option(help="Text, JSONL, Parquet or datasets folder.")] = None,
    held_out: Annotated[str | None, typer.Option(help="The same kinds, for the evaluation at the end.")] = None,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    sequence_length: Annotated[int, typer.Option(help="Tokens of a packed sequence.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 1,
    accumulation: Annotated[int, typer.Option(help="Micro-batches of an optimizer step.")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; default: what --minutes allow. With --resume it may grow.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time budget of the training, where --steps is absent.")] = 3.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear learning-rate warm-up.")] = 20,
    decay: Annotated[str, typer.Option(help="cosine (to zero) or none.")] = "cosine",
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
    num_heads: Annotated[int, typer.Option(help="Index heads I.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Index dim E.")] = 64,
    rope_dim: Annotated[int | None, typer.Option(help="Dims that rope turns; default min(32, E).")] = None,
    target: Annotated[str, typer.Option(help="mean, per_head or sum_logits.")] = "mean",
    layers: Annotated[str | None, typer.Option(help="Layers to train, such as 0,1,5-9; default all.")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Begin with the indexers of a run or native folder, and with their sizes.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto (bfloat16 on CUDA).")] = "auto",
    index_dtype: Annotated[str | None, typer.Option(help="fp8 or fp8_unrotated: train as it is served.")] = None,
    teacher_dtype: Annotated[
        str | None, typer.Option(help="fp8 or fp8_unrotated: the teacher's q and k in e4m3.")
    ] = None,
    indexers: Annotated[str, typer.Option(help="fresh, or own: those that the model has, trained in place.")] = "fresh",
    teachers: Annotated[str, typer.Option(help="Whose attention a shared indexer learns: shared or own.")] = "shared",
    queries: Queries = 1.0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    evaluate_sequences: Annotated[int, typer.Option(help="Held-out sequences to judge on at the end; 0: none.")] = 4,
    cp: Annotated[int, typer.Option("--cp", help="Processes that share each sequence (context parallel).")] = 1,
    tp: Annotated[int, typer.Option("--tp", help="Processes that share the heads (tensor parallel).")] = 1,
    cp_layout: Annotated[str, typer.Option(help="zigzag (balanced) or contiguous.")] = "zigzag",
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard the frozen model over the processes (FSDP2).")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds without an answer after which a process is given up.")] = 600,
) -> None:
    """Warm up a model's indexers; with a report at the end, on --held-out or, without --data, the embedded split."""
    with plain_errors():
        from flash_indexer.recipe.run_record import WarmupSettings, parse_layers, read_run, refuse_other_settings

        if evaluate_sequences < 0:
            raise ValueError(f"warmup: --evaluate-sequences must be 0 (none) or more, got {evaluate_sequences}")
        values = {name: value for name, value in context.params.items() if name in WarmupSettings.__dataclass_fields__}
        values["layers"] = parse_layers(layers, "warmup")
        settings, recorded = WarmupSettings(**values), read_run(out) if resume else {}
        typed = [name for name in values if was_typed(context, name)]
        refuse_other_settings(recorded, {name: getattr(settings, name) for name in typed})

        say_that_imports_take_time()
        from dataclasses import asdict

        import torch

        from flash_indexer.recipe import judging
        from flash_indexer.recipe.held_out import held_out_batches
        from flash_indexer.recipe.processes import ParallelSettings, is_main_process, leave
        from flash_indexer.recipe.run_folder import sizes_of_indexers
        from flash_indexer.recipe.warmup import warm_up

        if init_from is not None and not recorded:
            sizes = sizes_of_indexers(Path(init_from))
            settings = WarmupSettings(**(values | {name: x for name, x in sizes.items() if name not in typed}))
        parallel = ParallelSettings(cp=cp, tp=tp, layout=cp_layout, fsdp=fsdp, timeout=timeout)
        batches = None
        if evaluate_sequences > 0 and held_out is not None:  # now: a wrong path is told before the training
            batches = held_out_batches(recorded or asdict(settings), held_out, evaluate_sequences)
        handle = warm_up(settings, out, resume=resume, steps=steps, console=console, parallel=parallel)
        main, run = is_main_process(), read_run(out)
        leave()
        if not main:
            return
        judging.print_path(console, "indexer", out / "checkpoint")
        if (ended := judging.ended_by_time(run, out)) is not None:
            console.print(ended, highlight=False, soft_wrap=True, markup=False)
        if evaluate_sequences > 0 and batches is None:
            if run["data"] is None:
                batches = held_out_batches(run, None, evaluate_sequences)
            else:
                console.print("no report: for one, give --held-out, or `flash-indexer evaluate --data` text of its own")
        if batches is not None:
            with _trained_and_saved(out):
                if cp * tp > 1 or fsdp:
                    del handle
                    torch.cuda.empty_cache()
                    handle, _, _ = judging.load_trained(out, None, console, "warmup")
                serve = handle.index_dtype
                judging.judge_and_report(handle, batches, out, out / "report", run, console=console, serve=serve)


@app.command()
def evaluate(
    run_folder: Run,
    report: Annotated[Path | None, typer.Option(help="Folder of the report; default: report/ in --run.")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out text; default: the embedded split.")] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the text; default: as in training.")] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences.")] = 8,
    sequence_length: Annotated[
        int | None, typer.Option(help="Default: as in training; 1024 for a native folder, which records none.")
    ] = None,
    min_visible: Annotated[int, typer.Option(help="Masses at k count queries that see so many keys, 4k at least.")] = 0,
    perplexity_k: Annotated[list[int] | None, typer.Option(help="Keys of sparse perplexity, mass and ties.")] = None,
    serve: Annotated[
        Literal["bf16", "fp8", "fp8_unrotated"] | None,
        typer.Option(help="Index scores as servers form them, beside the model's; default: as they were trained."),
    ] = None,
    needles: Annotated[int, typer.Option(help="Of a sparse run: documents of a needle test at each of 3 depths.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was trained on.")] = None,
) -> None:
    """Judge indexers: those of a run, or a native indexer folder, on held-out text.

    Of a sparse run also: dense attention, sparse before and sparse after the training.
    """
    with plain_errors():
        from flash_indexer.recipe import judging
        from flash_indexer.recipe.held_out import held_out_batches
        from flash_indexer.recipe.run_folder import check_folder, check_report_folder
        from flash_indexer.recipe.run_record import RUN_FILE

        if sequences < 1:
            raise ValueError(f"evaluate: --sequences must be at least 1, got {sequences}")
        if sequence_length is not None and sequence_length < 2:
            raise ValueError(f"evaluate: --sequence-length must be at least 2, got {sequence_length}")
        if needles < 0:
            raise ValueError(f"evaluate: --needles must be 0 (none) or more, got {needles}")
        if min_visible < 0:
            raise ValueError(f"evaluate: --min-visible must be 0 or more, got {min_visible}")
        if any(k < 1 for k in perplexity_k or []):
            raise ValueError(f"evaluate: --perplexity-k must be 1 or more, got {min(perplexity_k or [])}")
        if report is None:
            check_folder("evaluate: --report", run_folder / "report")
        else:
            check_report_folder("evaluate: --report", report)
        handle, _, run = judging.load_trained(run_folder, model, console, "evaluate")
        if sequence_length is None and not (run_folder / RUN_FILE).exists():
            console.print(
                f"evaluating sequences of {run['sequence_length']} tokens: a native indexer folder doesn't say how "
                "long those of the training were; give --sequence-length for others",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        chosen = {"sequence_length": sequence_length, "column": column}
        run |= {name: value for name, value in chosen.items() if value is not None}
        batches = held_out_batches(run, data, sequences)
        folder, command = report or run_folder / "report", shlex.join(["flash-indexer", *sys.argv[1:]])
        judging.judge_and_report(
            handle, batches, run_folder, folder, run, console=console, command=command, min_visible=min_visible,
            perplexity_ks=tuple(perplexity_k or (run.get("topk", 128),)), serve=serve or handle.index_dtype,
        )  # fmt: skip
        if "topk" in run:
            from flash_indexer.recipe.comparing import compare_and_report

            handle.remove()
            del handle
            compare_and_report(
                run_folder, run, batches, folder, console=console, command=command, needle_count=needles
            )  # fmt: skip


@app.command()
def check(
    run_folder: Run,
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was trained on.")] = None,
    data: Annotated[str | None, typer.Option(help="Text; default: the embedded held-out split.")] = None,
    column: Annotated[str | None, typer.Option(help="Column that holds the text; default: as in training.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of the text; default: as in training.")] = None,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Also what FP8 changes: KL, gradients, selected keys; with a plot.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Folder of --fp8's plot and JSON; default: fp8/ in --run.")
    ] = None,
) -> None:
    """Check the teacher: every head's probabilities must sum to 1 on real text (within 1e-2)."""
    with plain_errors():
        from flash_indexer.recipe import checking, judging
        from flash_indexer.recipe.held_out import held_out_batches
        from flash_indexer.recipe.run_folder import check_folder

        if report is not None and not fp8:
            raise ValueError("check: --report is the folder of what --fp8 measures; add --fp8")
        if sequence_length is not None and sequence_length < 2:
            raise ValueError(f"check: --sequence-length must be at least 2, got {sequence_length}")
        folder = report or run_folder / "fp8"
        if fp8:
            check_folder("check: --report", folder)
        handle, _, run = judging.load_trained(run_folder, model, console, "check")
        chosen = {"sequence_length": sequence_length, "column": column}
        run |= {name: value for name, value in chosen.items() if value is not None}
        batch = held_out_batches(run, data, 1)[0]
        checking.check_teacher(handle, batch, console)
        if fp8:
            command = shlex.join(["flash-indexer", *sys.argv[1:]])
            checking.check_fp8(handle, batch, folder, {**run, "data": data, "command": command}, console)


@app.command()
def export(
    run_folder: Run,
    path: Annotated[Path, typer.Argument(help="Directory to write.")],
    format: Annotated[
        Literal["deepseek_v32", "native", "own"] | None,
        typer.Option(help="A checkpoint, of an MLA model with q-LoRA (default) or of own indexers; or they alone."),
    ] = None,
    topk: Annotated[
        int | None,
        typer.Option(help="Keys that each query of a deepseek_v32 checkpoint attends to; default the run's, or 2048."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export at PATH.")] = False,
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was trained on.")] = None,
) -> None:
    """Write trained indexers as a checkpoint that Transformers loads, or in the native format."""
    with plain_errors():
        from flash_indexer.files.export import export as write
        from flash_indexer.files.native import check_replaceable, read_native
        from flash_indexer.models.load import model_fingerprint
        from flash_indexer.recipe import judging
        from flash_indexer.recipe.judgement import note_judgement, tied_rows
        from flash_indexer.recipe.run_folder import indexer_folder
        from flash_indexer.recipe.sparse_start import TOPK

        if topk is not None and format in ("native", "own"):
            raise ValueError(f"export: --topk belongs to --format deepseek_v32, got {topk} with {format}; leave it out")
        if topk is not None and topk < 1:
            raise ValueError(f"export: --topk must be at least 1, got {topk}")
        check_replaceable(path, overwrite=overwrite)
        handle, tokenizer, run = judging.load_trained(run_folder, model, console, "export")
        format = format or ("own" if handle.trains_own else "deepseek_v32")
        _print_path("writing", path)
        if "topk" in run and handle.trains_own:  # so many keys Transformers and servers are to select as well
            handle.model.config.get_text_config().index_topk = run["topk"]
        if "topk" in run and format == "native":
            from flash_indexer.files.trained import save_sparse
            from flash_indexer.models.own_sparse import make_sparse

            sparse = make_sparse(handle, run["topk"])
            save_sparse(sparse, path, tokenizer=tokenizer, base_name=run["model"], overwrite=overwrite)
            judging.print_path(console, "exported", path)
            return
        options: dict[str, Any] = {} if format == "native" else dict(tokenizer=tokenizer)
        ties = None
        if format == "deepseek_v32":
            index_topk = topk or run.get("topk", TOPK)
            ties = tied_rows(run_folder, handle, index_topk)
            options |= dict(index_topk=index_topk, tied_rows=ties.share)
        trained = "topk" in run  # the model, which then is no longer the one that is recorded
        native = None if trained else read_native(indexer_folder(run_folder))
        recorded = model_fingerprint(handle.model) if native is None else native.config.base_fingerprint
        write(
            handle, path, format=format, base_name=run["model"], base_fingerprint=recorded, overwrite=overwrite,
            **options,
        )  # fmt: skip
        note_judgement(run_folder, handle, path, console, ties)
        judging.print_path(console, "exported", path)


@app.command()
def bench(
    sizes: Annotated[str | None, typer.Option(help="Comma-separated; default: all of the suite.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="mqa64: attention and per-head KL; attention: it alone; fp8: the loss in e4m3; sparse: its stage."
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="With --suite mqa64: only so many documents.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --suite mqa64: percentiles and clocks.")] = False,
    out: Annotated[Path, typer.Option(help="Folder that gets the measurements, a line each.")] = Path("results"),
    commit: Annotated[str, typer.Option(help="Recorded with the numbers.")] = "unknown",
) -> None:
    """Check, then time the operator on this GPU, beside FlashAttention-2, cuDNN and a matrix product."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    with plain_errors():
        from flash_indexer.bench import attention as bench_attention
        from flash_indexer.bench import fp8 as bench_fp8
        from flash_indexer.bench import kl as benchmark
        from flash_indexer.bench import per_head as bench_heads
        from flash_indexer.bench import sparse as bench_sparse

        suites = {module.SUITE: module for module in (bench_attention, bench_fp8, bench_sparse)}
        if suite in (None, *suites) and (batch is not None or verbose):
            raise ValueError("bench: --batch and --verbose belong to --suite mqa64; add it")
        names = None if sizes is None else sizes.split(",")
        if suite in suites:
            suites[suite].run(out, names, commit=commit, say=say)
            _print_path("results", out / suites[suite].RESULTS)
            return
        if suite is not None:
            if names is not None:
                raise ValueError("bench: --sizes must be left out with --suite mqa64, which takes --batch")
            bench_heads.run(suite, out, batch=batch, verbose=verbose, commit=commit, say=say)
            _print_path("results", out / bench_heads.RESULTS)
            return
        benchmark.run(list(benchmark.SIZES) if names is None else names, out, commit=commit, say=say)
        _print_path("results", out / "indexer_kl.jsonl")


@app.command()
def tune(
    heads: Annotated[int, typer.Option(help="Query heads H, as many as index heads.")] = 64,
    key_heads: Annotated[int, typer.Option(help="Key heads G.")] = 1,
    head_dim: Annotated[int, typer.Option(help="Width D of queries and keys.")] = 128,
    value_dim: Annotated[int, typer.Option(help="Width V of values.")] = 128,
    index_dim: Annotated[int, typer.Option(help="Index dim E: 32, 64 or 128.")] = 64,
    documents: Annotated[
        str | None, typer.Option(help="Tokens, such as 2048x4,512; default: 4 of about 2,048.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File that gets the winners; default: the one kernels read.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and write nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print what is in use, and measure nothing.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Remove the winners: the shipped tiles are used.")] = False,
) -> None:
    """Find the fastest tiles of the attention kernels for your shapes on this GPU, and have them used from then on."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    with plain_errors():
        from flash_indexer.bench import tune as tuning

        if dry_run + show + reset > 1:
            raise ValueError("tune: give one of --dry-run, --show and --reset")
        if show or reset:
            act = tuning.show if show else tuning.reset
            act(out or tuning.location(), say)
            return
        size = tuning.parse_size(heads, key_heads, head_dim, value_dim, index_dim, documents)
        tuning.run(size, out=out, dry_run=dry_run, console=console)


app.add_typer(sparse_app)


def main() -> None:
    """Entry point of the command `flash-indexer`."""
    app()


def _print_path(name: str, path: Path) -> None:
    console.print(f"{name:<9}{path}", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _trained_and_saved(out: Path) -> Iterator[None]:
    """That the whole model does not fit beside its evaluation, or that this is interrupted, must not hide it."""
    import torch

    saved = f"the indexer is trained and saved in {out / 'checkpoint'}: run `flash-indexer evaluate --run {out}`"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"warmup: the evaluation ran out of memory ({str(error).partition(chr(10))[0]}); {saved} where the whole "
            "model fits"
        ) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"warmup: the evaluation was interrupted; {saved} for a report") from error
