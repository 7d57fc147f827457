"""How exact the operators are: the error against float64 beside the eager formula's, and docs/precision.md of it.

    OMP_NUM_THREADS=1 python benchmarks/precision.py --commit $(git rev-parse HEAD)       float32 on the CPU
    python benchmarks/precision.py --device cuda --commit $(git rev-parse HEAD)           bfloat16 and e4m3 on a GPU
    python benchmarks/precision.py --page                                                 writes the page and its plot

Appends a line for each problem and setting to benchmarks/results/precision.jsonl. Up to 2,048 tokens whole tensors are
compared; beyond, 64 queries spread over the sequence, and 64 keys for d_index_k, which is summed over all queries.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flash_indexer.bench.timing import environment, needs_gpu
from flash_indexer.ops.kl.arithmetic import FP8, UNROTATED
from precision_inputs import CASES, SIZES, USUAL, problem
from precision_truth import Problem, Setting, errors, rms, rounded

TOKENS = {"cpu": (64, 512, 2048), "cuda": (64, 512, 2048, 8192, 32768, 131072)}
SHORT = 512  # tokens of the inputs that hurt, and of all combinations of targets and e4m3
DEEPSEEK = 2048  # tokens at widths of DeepSeek-V3.2, on a GPU
TARGETS = ("mean", "sum_logits", "per_head")
E4M3 = ((FP8, None), (UNROTATED, None), (None, FP8), (FP8, FP8))
BOTH = Setting(index_dtype=FP8, teacher_dtype=FP8)
INDEX_E4M3 = (Setting(index_dtype=FP8), Setting(index_dtype=UNROTATED))
ATTENTION, WARMUP = Setting("attention_forward"), Setting("warmup_attention", "per_head")
EACH = (*(Setting(target=target) for target in TARGETS), BOTH, ATTENTION, WARMUP)
DEEPSEEK_SETTINGS = (
    Setting(), Setting(target="sum_logits"), *(Setting("indexer_kl", "mean", *dtypes) for dtypes in E4M3), ATTENTION
)  # fmt: skip


class Job(NamedTuple):
    """A problem and what is measured of it."""

    size: str
    case: str
    tokens: int
    settings: tuple[Setting, ...]


def jobs(tokens: tuple[int, ...], short: int, deepseek: int) -> Iterator[Job]:
    """All lengths; e4m3 in all its forms; the inputs that hurt; with deepseek > 0 its widths at so many tokens."""
    for count in tokens:
        yield Job("gqa", USUAL, count, EACH)
    e4m3 = tuple(Setting("indexer_kl", target, *dtypes) for target in TARGETS for dtypes in E4M3)
    yield Job("gqa", USUAL, short, e4m3)
    for case in CASES:
        yield Job("gqa", case, short, (*EACH, *INDEX_E4M3))
    if deepseek:
        yield Job("v32", USUAL, deepseek, DEEPSEEK_SETTINGS)


def measure(job: Job, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """A record for each setting, without what it shares with those of other jobs."""
    posed = Problem(*problem(SIZES[job.size], job.case, job.tokens, dtype, device))
    for setting in job.settings:
        got, truth, eager = posed.ours(setting), posed.truth(setting), posed.eager(setting)
        original = posed.truth(Setting(setting.operator, setting.target))
        tensors = {}
        for name in got.keys() & truth.keys():
            tensors[name] = {
                "rms": rounded(rms(truth[name])), "eps": torch.finfo(got[name].dtype).eps,
                "ours": errors(got[name], truth[name]), "eager": errors(eager[name], truth[name]),
            }  # fmt: skip
            if not setting.is_wide:
                tensors[name]["quantisation"] = errors(got[name], original[name])
        yield {
            "size": job.size, "case": job.case, "tokens": job.tokens, **setting._asdict(),
            "compared": str(posed.sample), "tensors": {name: tensors[name] for name in got if name in tensors},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="*", help="lengths; all of the device's without it")
    parser.add_argument("--short", type=int, default=SHORT, help="tokens of the inputs that hurt")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--page", action="store_true", help="measure nothing; write docs/precision.md and its plot")
    arguments = parser.parse_args()
    if arguments.page:
        import precision_page

        precision_page.write()
        return
    run(arguments.device, arguments.tokens, arguments.short, arguments.out, arguments.commit)


def run(device: str, tokens: list[int] | None, short: int, out: Path, commit: str) -> None:
    """Measures and appends to out/precision.jsonl.

    Raises:
        OSError: for "cuda" without a GPU of compute capability 9.0. UserWarning: where a kernel does not run there.
    """
    if device == "cuda":
        needs_gpu("precision")
    dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}[device]
    shared = {**where(device, commit), "dtype": str(dtype).removeprefix("torch.")}
    out.mkdir(parents=True, exist_ok=True)
    lengths = TOKENS[device] if tokens is None else tuple(tokens)
    with warnings.catch_warnings(), (out / "precision.jsonl").open("a", encoding="utf-8") as file:
        warnings.filterwarnings("error", message=".*runs the blockwise torch body")
        for job in jobs(lengths, short, DEEPSEEK if device == "cuda" else 0):
            for record in measure(job, dtype, device):
                file.write(json.dumps(shared | record) + "\n")
                file.flush()
                print(summary(record), flush=True)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def where(device: str, commit: str) -> dict[str, Any]:
    """What an error may depend on besides the code."""
    if device == "cuda":
        found = environment(commit)
        return {**found, "device": found["gpu"]}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"timestamp": now, "commit": commit, "torch": torch.__version__, "device": "CPU"}


def summary(record: dict[str, Any]) -> str:
    """One line for people."""
    options = [record[name] for name in ("target", "index_dtype", "teacher_dtype")]
    problem = f"{record['size']} {record['case']} {record['tokens']} {record['operator']} {options}"
    numbers = ", ".join(f"{n} {x['ours'][0]:.1e} ({x['eager'][0]:.1e})" for n, x in record["tensors"].items())
    return f"{problem}: {numbers}"


if __name__ == "__main__":
    main()
