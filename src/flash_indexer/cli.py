"""The command line. Each command calls the library and prints where things are."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from flash_indexer.recipe.progress import print_error

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Train and judge lightning indexers (DeepSeek Sparse Attention) for dense models.",
)  # fmt: skip
console = Console()

Out = Annotated[Path, typer.Option(help="Folder of the run: settings, metrics, checkpoint, report.")]


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
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; default: what --minutes allow.")] = None,
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
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto (bfloat16 on CUDA).")] = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    evaluate_sequences: Annotated[int, typer.Option(help="Held-out sequences to judge on at the end; 0: none.")] = 4,
    cp: Annotated[int, typer.Option("--cp", help="Processes that share each sequence (context parallel).")] = 1,
    tp: Annotated[int, typer.Option("--tp", help="Processes that share the heads (tensor parallel).")] = 1,
    cp_layout: Annotated[str, typer.Option(help="zigzag (balanced) or contiguous.")] = "zigzag",
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard the frozen model over the processes (FSDP2).")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds without an answer after which a process is given up.")] = 600,
) -> None:
    """Warm up a model's indexers; with a report at the end, on --held-out or, without --data, the embedded split."""
    with _plain_errors():
        from dataclasses import asdict

        import torch

        from flash_indexer.recipe.held_out import held_out_batches
        from flash_indexer.recipe.processes import ParallelSettings, is_main_process, leave
        from flash_indexer.recipe.run_record import WarmupSettings, read_run
        from flash_indexer.recipe.warmup import warm_up

        given = {name: value for name, value in context.params.items() if name in WarmupSettings.__dataclass_fields__}
        given["layers"] = _parse_layers(layers)
        settings = WarmupSettings(**given)
        explicit = {name: getattr(settings, name) for name in given if _was_given(context, name)}
        _refuse_other_settings(out, resume, explicit)
        parallel = ParallelSettings(cp=cp, tp=tp, layout=cp_layout, fsdp=fsdp, timeout=timeout)
        batches = None
        if evaluate_sequences > 0 and held_out is not None:  # now: a wrong path is told before the training
            batches = held_out_batches(
                (read_run(out) if resume else {}) or asdict(settings), held_out, evaluate_sequences
            )
        handle = warm_up(settings, out, resume=resume, console=console, parallel=parallel)
        main, run = is_main_process(), read_run(out)
        leave()
        if not main:
            return
        _print_path("indexer", out / "checkpoint")
        if evaluate_sequences > 0 and batches is None:
            if run["data"] is None:
                batches = held_out_batches(run, None, evaluate_sequences)
            else:
                console.print("no report: for one, give --held-out, or `flash-indexer evaluate --data` text of its own")
        if batches is not None:
            with _memory_for_evaluation(out):
                if cp * tp > 1 or fsdp:
                    del handle
                    torch.cuda.empty_cache()
                    handle, _, _ = _load(out, None)
                _judge(handle, batches, out, out / "report", run)


@app.command()
def evaluate(
    out: Out,
    report: Annotated[Path | None, typer.Option(help="Folder of the report; default: report/ in --out.")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out text; default: the embedded split.")] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences.")] = 8,
    sequence_length: Annotated[int | None, typer.Option(help="Default: as in training.")] = None,
    min_visible: Annotated[int, typer.Option(help="Masses at k count queries that see so many keys, 4k at least.")] = 0,
    perplexity_k: Annotated[list[int] | None, typer.Option(help="Keys per query for sparse perplexity.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was trained on.")] = None,
) -> None:
    """Judge indexers: those of a run, or a native indexer folder, on held-out text."""
    with _plain_errors():
        from flash_indexer.recipe.held_out import held_out_batches
        from flash_indexer.recipe.run_record import check_folder

        if sequences < 1:
            raise ValueError(f"evaluate: --sequences must be at least 1, got {sequences}")
        if sequence_length is not None and sequence_length < 2:
            raise ValueError(f"evaluate: --sequence-length must be at least 2, got {sequence_length}")
        check_folder("evaluate: --report", report or out / "report")
        handle, _, run = _load(out, model)
        length = int(run["sequence_length"]) if sequence_length is None else sequence_length
        batches = held_out_batches({**run, "sequence_length": length}, data, sequences)
        ks = tuple(perplexity_k) if perplexity_k else (128,)
        command = shlex.join(["flash-indexer", *sys.argv[1:]])
        _judge(handle, batches, out, report or out / "report", run, command, min_visible, ks)


@app.command()
def check(
    out: Out,
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was trained on.")] = None,
    data: Annotated[str | None, typer.Option(help="Text; default: the embedded held-out split.")] = None,
) -> None:
    """Check the teacher: every head's probabilities must sum to 1 on real text (within 1e-2)."""
    with _plain_errors():
        from flash_indexer.judge.teacher_check import teacher_errors
        from flash_indexer.recipe.held_out import held_out_batches

        handle, _, run = _load(out, model)
        errors = teacher_errors(handle, held_out_batches(run, data, 1)[0])
        for layer, error in errors.items():
            console.print(f"layer {layer}: max |sum_s a[t,h,s] - 1| = {error:.2e}", highlight=False)
        worst = max(errors, key=lambda layer: float("inf") if errors[layer] != errors[layer] else errors[layer])
        if not errors[worst] <= 1e-2:
            raise ValueError(f"check: layer {worst}'s rows sum to 1 only within {errors[worst]:.2e}, above 1e-2")


@app.command()
def export(
    out: Out,
    path: Annotated[Path, typer.Argument(help="Directory to write.")],
    format: Annotated[
        Literal["deepseek_v32", "native"], typer.Option(help="A whole checkpoint, or the indexers alone.")
    ] = "native",
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was trained on.")] = None,
) -> None:
    """Write trained indexers as a checkpoint that Transformers loads as deepseek_v32, or in the native format."""
    with _plain_errors():
        from flash_indexer.files.export import export as write
        from flash_indexer.models.load import model_fingerprint

        handle, tokenizer, run = _load(out, model)
        options: dict[str, Any] = dict(tokenizer=tokenizer) if format == "deepseek_v32" else {}
        fingerprint = model_fingerprint(handle.model)
        write(handle, path, format=format, base_name=run["model"], base_fingerprint=fingerprint, **options)
        _print_path("exported", path)


@app.command()
def bench(
    sizes: Annotated[str | None, typer.Option(help="Comma-separated; default: all of the README's table.")] = None,
    suite: Annotated[str | None, typer.Option(help="mqa64: attention and per-head KL; attention: it alone.")] = None,
    batch: Annotated[int | None, typer.Option(help="With --suite mqa64: only so many documents.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --suite mqa64: percentiles and clocks.")] = False,
    out: Annotated[Path, typer.Option(help="Folder that gets the measurements, a line each.")] = Path("results"),
    commit: Annotated[str, typer.Option(help="Recorded with the numbers.")] = "unknown",
) -> None:
    """Check, then time the operator on this GPU, beside FlashAttention-2, cuDNN and a matrix product."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    with _plain_errors():
        from flash_indexer.bench import attention as bench_attention
        from flash_indexer.bench import kl as benchmark
        from flash_indexer.bench import per_head as bench_heads

        if suite in (None, bench_attention.SUITE) and (batch is not None or verbose):
            raise ValueError("bench: --batch and --verbose belong to --suite mqa64; add it")
        if suite is not None and sizes is not None:
            raise ValueError("bench: give --sizes (of indexer_kl) or --suite (of warmup_attention), not both")
        if suite == bench_attention.SUITE:
            bench_attention.run(out, commit=commit, say=say)
            _print_path("results", out / bench_attention.RESULTS)
            return
        if suite is not None:
            bench_heads.run(suite, out, batch=batch, verbose=verbose, commit=commit, say=say)
            _print_path("results", out / bench_heads.RESULTS)
            return
        names = sizes.split(",") if sizes else list(benchmark.SIZES)
        benchmark.run(names, out, commit=commit, say=say)
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

    with _plain_errors():
        from flash_indexer.bench import tune as tuning

        if dry_run + show + reset > 1:
            raise ValueError("tune: give one of --dry-run, --show and --reset")
        if show or reset:
            act = tuning.show if show else tuning.reset
            act(out or tuning.location(), say)
            return
        size = tuning.parse_size(heads, key_heads, head_dim, value_dim, index_dim, documents)
        tuning.run(size, out=out, dry_run=dry_run, console=console)


def main() -> None:
    """Entry point of the command `flash-indexer`."""
    app()


def _judge(
    handle: Any,
    batches: list[Any],
    out: Path,
    report: Path,
    run: dict[str, Any],
    command: str | None = None,
    min_visible: int = 0,
    perplexity_ks: tuple[int, ...] = (128,),
) -> None:
    """Evaluates a handle on held-out text and writes the report."""
    from rich.progress import Progress

    from flash_indexer.judge.evaluation import evaluate as judge
    from flash_indexer.judge.report import write_report
    from flash_indexer.judge.verdict import summary_lines
    from flash_indexer.recipe.run_record import METRICS_FILE, read_metrics, warmup_command

    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=None)

        def advance(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        found = judge(handle, batches, min_visible=min_visible, perplexity_ks=perplexity_ks, progress=advance)
    trained = [warmup_command(run, out)] if "steps" in run else []
    run = {**run, "command": "\n".join([*trained, *([command] if command else [])])}
    path = write_report(report, evaluation=found, metrics_log=read_metrics(out / METRICS_FILE), run=run)
    for line in summary_lines(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    _print_path("plots", report)
    _print_path("report", path)


def _print_path(name: str, path: Path) -> None:
    console.print(f"[bold]{name:<9}[/bold]{escape(str(path))}", highlight=False, soft_wrap=True)


def _indexer_folder(out: Path) -> Path:
    """A run's checkpoint, or the folder itself where it is a native indexer directory."""
    from flash_indexer.recipe.run_record import CHECKPOINT, RUN_FILE

    own = (out / "indexer_config.json").exists() and not (out / RUN_FILE).exists()
    return out if own else out / CHECKPOINT


def _load(out: Path, model: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """The handle and tokenizer of a run or a native indexer folder, and the settings it was trained with."""
    import torch

    from flash_indexer.files.native import load_native, read_native
    from flash_indexer.models.load import load_model, model_fingerprint
    from flash_indexer.recipe.run_record import WarmupSettings, read_run

    checkpoint = _indexer_folder(out)
    config = read_native(checkpoint).config
    name = model or config.base_name
    run = read_run(out) or {"sequence_length": WarmupSettings.sequence_length}
    base, tokenizer = load_model(name, dtype=getattr(torch, run.get("dtype", config.base_dtype)))
    if torch.cuda.is_available():
        torch.nn.Module.cuda(base)
    handle = load_native(base, checkpoint, base_fingerprint=model_fingerprint(base))
    return handle, tokenizer, {**run, "model": name}


def _refuse_other_settings(out: Path, resume: bool, explicit: dict[str, Any]) -> None:
    """An option given beside --resume must say what the run was started with."""
    from flash_indexer.recipe.run_record import read_run

    recorded = read_run(out) if resume else {}
    for name, value in explicit.items():
        before = recorded.get(name, value)
        if (name, value) == ("dtype", "auto"):
            continue  # what it came to when the run began
        if name in ("model", "data") and value is not None and before is not None:
            before, value = os.path.normpath(before), os.path.normpath(value)
        if (tuple(before) if isinstance(before, list) else before) != value:
            raise ValueError(
                f"warmup: --{name.replace('_', '-')} must be {before} as when the run began, got {value}; "
                "leave it out, or start a new run in another --out"
            )


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    """ "0,1,5-7" -> (0, 1, 5, 6, 7)."""
    if text is None:
        return None
    try:
        chosen: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not span:
                raise ValueError
            chosen += span
    except ValueError:
        raise ValueError(f"warmup: --layers must be like 0,1,5-9, got {text!r}") from None
    return tuple(chosen)


@contextmanager
def _memory_for_evaluation(out: Path) -> Iterator[None]:
    """The training is over and saved: that the whole model does not fit beside its evaluation must not hide it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"warmup: the evaluation ran out of memory ({str(error).partition(chr(10))[0]}); the indexer is trained "
            f"and saved in {out / 'checkpoint'}: run `flash-indexer evaluate --out {out}` where the whole model fits"
        ) from error


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Expected failures end with their message alone and exit code 1; bugs keep their traceback."""
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as error:
        print_error(error)
        if isinstance(error, ConnectionError):
            from flash_indexer.recipe.processes import end_if_shared

            end_if_shared(1)
        raise typer.Exit(1) from error
