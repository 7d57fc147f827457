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
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_indexer import indexer_kl, reference, warmup_attention
from flash_indexer.bench.timing import environment, needs_gpu
from flash_indexer.ops import attention_forward
from flash_indexer.ops.kl.arithmetic import FP8, UNROTATED
from flash_indexer.ops.quantization import dequantize, quantize, rotate
from flash_indexer.testing import Inputs, eager_attention, eager_indexer_kl, reference_indexer_kl
from precision_inputs import CASES, SIZES, USUAL, Size, problem

WHOLE = 2048  # tokens up to which whole tensors are compared
SAMPLED = 64
TOKENS = {"cpu": (64, 512, 2048), "cuda": (64, 512, 2048, 8192, 32768, 131072)}
SHORT = 512  # tokens of the inputs that hurt, and of all combinations of targets and e4m3
DEEPSEEK = 2048  # tokens at sizes like DeepSeek-V3.2's, on a GPU
TARGETS = ("mean", "sum_logits", "per_head")
ELEMENTS = 2**28  # of a block of logits: in float64 a block is 2 GiB, of which a handful exist at a time
SMALL_ROW = 0.01  # a row's error is told in units of its own rms, or of this part of the whole tensor's


class Setting(NamedTuple):
    """An operator and the options that change its arithmetic."""

    operator: str = "indexer_kl"
    target: str = "mean"
    index_dtype: str | None = None
    teacher_dtype: str | None = None

    @property
    def is_wide(self) -> bool:
        return self.index_dtype is None and self.teacher_dtype is None


BOTH = Setting(index_dtype=FP8, teacher_dtype=FP8)
E4M3 = ((FP8, None), (UNROTATED, None), (None, FP8), (FP8, FP8))
ATTENTION, WARMUP = Setting("attention_forward"), Setting("warmup_attention", "per_head")
EACH = (*(Setting(target=target) for target in TARGETS), BOTH, ATTENTION, WARMUP)
INDEX_E4M3 = (Setting(index_dtype=FP8), Setting(index_dtype=UNROTATED))
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
    """All lengths; e4m3 in all its forms; the inputs that hurt; with deepseek > 0 its sizes at so many tokens."""
    for count in tokens:
        yield Job("gqa", USUAL, count, EACH)
    e4m3 = tuple(Setting("indexer_kl", target, *dtypes) for target in TARGETS for dtypes in E4M3)
    yield Job("gqa", USUAL, short, e4m3)
    for case in CASES:
        yield Job("gqa", case, short, (*EACH, *INDEX_E4M3))
    if deepseek:
        yield Job("v32", USUAL, deepseek, DEEPSEEK_SETTINGS)


class Sample(NamedTuple):
    """Queries and keys that are compared; None means all."""

    rows: Tensor | None
    keys: Tensor | None

    @classmethod
    def of(cls, tokens: int, device: str) -> Sample:
        """Spread evenly over the sequence, the last query and the first and last key included."""
        if tokens <= WHOLE:
            return cls(None, None)
        places = torch.linspace(0, tokens - 1, SAMPLED + 1, device=device).long()
        return cls(places[1:], places[:-1])


Values = dict[str, Tensor]


def measure(job: Job, dtype: torch.dtype, device: str) -> Iterator[dict[str, Any]]:
    """A record for each setting, without what it shares with those of other jobs."""
    size = SIZES[job.size]
    x, v = problem(size, job.case, job.tokens, dtype, device)
    sample = Sample.of(job.tokens, device)
    truths: dict[tuple[str, str], Values] = {}
    for setting in job.settings:
        y = spread_summed_logits(x) if setting.target == "sum_logits" else x
        got = sampled(ours(y, v, setting), sample)
        stands_for = stand_in(y, setting)
        truth, eager = (evaluate(stands_for, v, setting, sample, wide=wide) for wide in (True, False))
        if setting.is_wide:
            original = truths[setting.operator, setting.target] = truth
        else:
            plain = Setting(setting.operator, setting.target)
            key = plain.operator, plain.target
            if key not in truths:
                truths[key] = evaluate(y, v, plain, sample, wide=True)
            original = truths[key]
        yield {
            "size": job.size, "case": job.case, "tokens": job.tokens, **setting._asdict(),
            "compared": "all" if sample.rows is None else f"{len(sample.rows)} queries, {len(sample.keys)} keys",
            "tensors": {
                name: {
                    "rms": rms(truth[name].reshape(1, -1)), "eps": torch.finfo(value.dtype).eps,
                    "ours": errors(value, truth[name]), "eager": errors(eager[name], truth[name]),
                    **({} if setting.is_wide else {"quantisation": errors(value, original[name])}),
                }
                for name, value in got.items() if name in truth
            },
        }  # fmt: skip


def spread_summed_logits(x: Inputs) -> Inputs:
    """A scale at which a sum over heads spreads as one head's logits do."""
    return replace(x, softmax_scale=x.softmax_scale * x.q.shape[1] ** -0.5)


def ours(x: Inputs, v: Tensor, setting: Setting) -> Values:
    """The operator's values, and its gradients under the loss's mean over queries."""
    common: dict[str, Any] = dict(softmax_scale=x.softmax_scale, key_start=x.key_start, key_end=x.key_end)
    if setting.operator == "attention_forward":
        return dict(zip(("out", "lse"), attention_forward(x.q, x.k, v, **common), strict=True))
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x.index_q, x.index_k, x.index_weights)]
    if setting.operator == "warmup_attention":
        result: Any = warmup_attention(x.q, x.k, v, *leaves, **common, target=setting.target)
    else:
        result = indexer_kl(
            x.q, x.k, *leaves, **common, lse=given_lse(x, setting), target=setting.target,
            index_dtype=setting.index_dtype, teacher_dtype=setting.teacher_dtype,
        )  # fmt: skip
    gradients = torch.autograd.grad(result.loss, leaves)
    names = ("d_index_q", "d_index_k", "d_index_weights")
    values = result._asdict() | dict(zip(names, gradients, strict=True))
    return {name: value.detach() for name, value in values.items()}


def given_lse(x: Inputs, setting: Setting) -> Tensor | None:
    """The attention's, as in training; a teacher in e4m3 has one of its own, and other targets read none."""
    return x.lse if setting.target == "mean" and setting.teacher_dtype is None else None


def stand_in(x: Inputs, setting: Setting) -> Inputs:
    """The numbers that the rounded rows stand for, in the inputs' dtype, which holds them exactly."""
    if setting.teacher_dtype is not None:
        x = replace(x, q=dequantize(quantize(x.q), x.q.dtype), k=dequantize(quantize(x.k), x.k.dtype))
    if setting.index_dtype is not None:
        rotation = setting.index_dtype == FP8
        index = (dequantize(quantize(y, rotation=rotation), y.dtype) for y in (x.index_q, x.index_k))
        x = replace(x, **dict(zip(("index_q", "index_k"), index, strict=True)))
    return x


def evaluate(x: Inputs, v: Tensor, setting: Setting, sample: Sample, *, wide: bool) -> Values:
    """The reference in float64, or the eager formula in the inputs' dtype; gradients rotated back where rows were."""
    part = x if sample.rows is None else rows_of(x, sample.rows)
    values: Values = {}
    if setting.operator != "indexer_kl":
        attention = attention_in_float64(part, v) if wide else eager_attention(part, v)
        values |= dict(zip(("out", "lse"), attention, strict=True))
    if setting.operator == "attention_forward":
        return values
    options: dict[str, Any] = dict(target=setting.target, token_weight=torch.full_like(part.token_weight, 1 / len(x.q)))
    if wide:
        values |= reference_indexer_kl(part, **options)._asdict()
    else:
        values |= eager_indexer_kl(part, lse=given_lse(part, setting), **options)._asdict()
    if sample.keys is not None:
        del values["loss"]  # of all queries
        values["d_index_k"] = key_gradients(x, sample.keys, setting.target, torch.float64 if wide else torch.float32)
    if setting.index_dtype == FP8:
        for name in ("d_index_q", "d_index_k"):
            gradient = values[name]
            values[name] = rotate(gradient if wide else gradient.float()).to(gradient.dtype)
    return values


def attention_in_float64(x: Inputs, v: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return reference.attention(x.q, x.k, v.double(), x.softmax_scale, x.key_start, x.key_end)


def rows_of(x: Inputs, rows: Tensor | slice) -> Inputs:
    """Some queries, and all keys."""
    names = ("q", "index_q", "index_weights", "key_start", "key_end", "lse", "token_weight")
    return replace(x, **{name: getattr(x, name)[rows] for name in names})


def sampled(values: Values, sample: Sample) -> Values:
    if sample.rows is None:
        return values
    places = {name: sample.keys if name == "d_index_k" else sample.rows for name in values if name != "loss"}
    return {name: values[name][place] for name, place in places.items()}


def key_gradients(x: Inputs, keys: Tensor, target: str, dtype: torch.dtype) -> Tensor:
    """d_index_k[s] = sum_t,j dS[t,j,s] * index_q[t,j] of a few keys s, over all queries, a block of them at a time.

        dS[t,j,s] = (softmax(i[t,:])[s] - p[t,s]) / T * w[t,j] * [index_q[t,j]·index_k[s] > 0]

    In float64, or in float32 with dS rounded once to index_q's dtype and the result once, as the eager formula has it.
    """
    low, heads = x.index_q.dtype, x.q.shape[1]
    total = torch.zeros(len(keys), x.index_k.shape[1], dtype=dtype, device=keys.device)
    step = max(ELEMENTS // (max(heads, x.index_q.shape[1]) * len(x.k)), 1)
    for begin in range(0, len(x.q), step):
        part = rows_of(x, slice(begin, begin + step))
        seen = slice(0, int(part.key_end[-1]))
        ds, index_q = score_gradients(part, seen, keys, target, dtype)
        ds /= len(x.q)
        total += torch.einsum("tis,tie->se", ds if dtype == torch.float64 else ds.to(low).to(dtype), index_q)
    return total if dtype == torch.float64 else total.to(low)


def score_gradients(x: Inputs, seen: slice, keys: Tensor, target: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """T times dS at some keys, [T, I, keys], and index_q, both in dtype. seen: keys beyond which no query of x sees."""
    q, k, index_q, index_k, w = (y.to(dtype) for y in (x.q, x.k, x.index_q, x.index_k, x.index_weights))
    start, end = x.key_start, x.key_end
    if target == "sum_logits":  # one head as wide as the key heads together
        q = q.unflatten(1, (k.shape[1], -1)).sum(2).flatten(1)[:, None]
        k = k.flatten(1)[:, None]
    lse = reference.teacher_lse(q, k[seen], x.softmax_scale, start, end)
    p = (reference.teacher_logits(q, k[keys], x.softmax_scale) - lse[..., None]).exp()
    if target == "mean":
        p = p.mean(1, keepdim=True)
    normaliser = reference.indexer_scores(index_q, index_k[seen], w, start, end, target).logsumexp(-1)
    logit = torch.einsum("tie,se->tis", index_q, index_k[keys])
    scores = w[..., None] * logit.relu()
    if target != "per_head":
        scores, normaliser = scores.sum(1, keepdim=True), normaliser[:, None]
    di = (scores - normaliser[..., None]).exp() - p
    if target == "per_head":
        di = di / q.shape[1]
    di = di.masked_fill(~reference.visible_keys(start, end, len(x.k))[:, None, keys], 0.0)
    return di * (logit > 0) * w[..., None], index_q


def errors(got: Tensor, truth: Tensor) -> list[float]:
    """rms(got - truth) / rms(truth), and the largest of a row; absolute where truth is zero throughout.

    A row is an entry of the first dimension, its error told in units of the row's rms, or of SMALL_ROW of the whole
    tensor's where that is more.
    """
    rows = truth.shape[0] if truth.ndim else 1
    difference, truth = (y.double().reshape(rows, -1) for y in (got.double() - truth, truth))
    whole = rms(truth.reshape(1, -1)) or 1.0
    each = difference.square().mean(1).sqrt() / truth.square().mean(1).sqrt().clamp_min(SMALL_ROW * whole)
    return [short(rms(difference.reshape(1, -1)) / whole), short(float(each.max()))]


def rms(row: Tensor) -> float:
    return float(row.double().square().mean().sqrt())


def short(x: float) -> float:
    """Three significant digits."""
    return float(f"{x:.2e}")


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
