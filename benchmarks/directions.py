"""How the gradients of a trained indexer point: bfloat16's and FP8's beside float64's, as training goes on.

    python benchmarks/directions.py --steps 1 32 47 200 --commit $(git rev-parse HEAD)

For each number of steps the embedded model's indexers are trained in float32; one held-out sequence gives every
layer's tensors. Rounded to bfloat16, as a bfloat16 model has them, they go through `indexer_kl` on --device: as they
are, with the index in FP8, and with the teacher in FP8 besides (on a CPU, which computes them in float32). Each
gradient is compared with float64's of the tensors before they were rounded: the cosine of the angle between them, of
all layers together, as an optimizer's step takes them, and the least of a layer's. And how long float64's is, over its
length at the first number of steps. Appends to benchmarks/results/directions.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from flash_indexer.judge.batches import batch_tensors
from flash_indexer.judge.fp8_check import GRADIENTS
from flash_indexer.models.capture import LayerCapture
from flash_indexer.ops import indexer_kl
from flash_indexer.recipe import judging
from flash_indexer.recipe.held_out import held_out_batches
from flash_indexer.recipe.run_record import WarmupSettings
from flash_indexer.recipe.warmup import warm_up
from report import RESULTS, Record, table

VARIANTS: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "index": {"index_dtype": "fp8"},
    "both": {"index_dtype": "fp8", "teacher_dtype": "fp8"},
}
NAMES = {"bfloat16": "bfloat16", "index": "index in FP8", "both": "both in FP8"}
TENSORS = ("q", "k", "lse", "index_q", "index_k", "index_weights")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=WarmupSettings.model)
    parser.add_argument("--data", help="training text; default: the standard library's")
    parser.add_argument("--held-out", help="text whose gradients are compared; default: its other half")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 32, 47, 200])
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the compared ones")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = []
    for steps in arguments.steps:
        records.append(measure(arguments, steps))
        with (arguments.out / "directions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print("\n".join(summary(records)), flush=True)


def measure(arguments: argparse.Namespace, steps: int) -> Record:
    """Trains so many steps, then compares the gradients of every layer."""
    settings = WarmupSettings(
        model=arguments.model, data=arguments.data, sequence_length=arguments.sequence_length, steps=steps,
        dtype="float32", save_every=steps,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        warm_up(settings, Path(folder) / "run", console=Console())
        handle, _, run = judging.load_trained(Path(folder) / "run", None, Console(), "directions")
        batch = held_out_batches(run, arguments.held_out, 1)[0]
    kl: list[float] = []
    exact: list[tuple[Tensor, ...]] = []
    found: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in VARIANTS}

    def compare(capture: LayerCapture) -> None:
        loss, wide = gradients({name: getattr(capture, name).double().cpu() for name in TENSORS}, capture, {})
        kl.append(loss)
        exact.append(wide)
        rounded = {name: getattr(capture, name).to(arguments.device) for name in TENSORS}
        dtype = torch.float32 if rounded["q"].device.type == "cpu" else torch.bfloat16
        rounded |= {name: x.bfloat16().to(dtype) for name, x in rounded.items() if name not in ("lse", "index_weights")}
        for name, dtypes in VARIANTS.items():
            found[name].append(gradients(rounded, capture, dtypes)[1])

    input_ids, position_ids = batch_tensors(batch, next(handle.model.parameters()).device)
    with torch.no_grad(), handle.using(compare):
        handle.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "commit": arguments.commit, "device": device, "torch": torch.__version__, "model": Path(arguments.model).name,
        "steps": steps, "sequence_length": arguments.sequence_length, "layers": len(kl), "kl": statistics.mean(kl),
        "cosine": {name: of_each(cosine_of_all, found[name], exact) for name in VARIANTS},
        "least_cosine": {name: of_each(least_cosine, found[name], exact) for name in VARIANTS},
        "length": of_each(lambda layers: float(together(layers).norm()), exact),
    }  # fmt: skip


def gradients(
    tensors: dict[str, Tensor], capture: LayerCapture, dtypes: dict[str, str]
) -> tuple[float, tuple[Tensor, ...]]:
    """Mean KL, and its gradients in float64."""
    leaves = [tensors[name].clone().requires_grad_() for name in ("index_q", "index_k", "index_weights")]
    at = tensors["q"].device
    with torch.enable_grad():
        loss = indexer_kl(
            tensors["q"], tensors["k"], *leaves, softmax_scale=capture.softmax_scale,
            key_start=capture.key_start.to(at), key_end=capture.key_end.to(at),
            lse=None if "teacher_dtype" in dtypes else tensors["lse"], **dtypes,
        ).loss  # fmt: skip
        found = torch.autograd.grad(loss, leaves)
    return float(loss.detach()), tuple(x.double().cpu() for x in found)


def of_each(measured: Callable[..., float], *layers: list[tuple[Tensor, ...]]) -> dict[str, float]:
    """What is measured of each of GRADIENTS, given its tensor in every layer, once for each list."""
    return {name: measured(*([layer[n] for layer in each] for each in layers)) for n, name in enumerate(GRADIENTS)}


def together(layers: list[Tensor]) -> Tensor:
    return torch.cat([layer.flatten() for layer in layers])


def cosine(gradient: Tensor, exact: Tensor) -> float:
    return float((gradient * exact).sum() / (gradient.norm() * exact.norm()))


def cosine_of_all(gradients: list[Tensor], exact: list[Tensor]) -> float:
    return cosine(together(gradients), together(exact))


def least_cosine(gradients: list[Tensor], exact: list[Tensor]) -> float:
    return min(map(cosine, gradients, exact))


def summary(records: list[Record]) -> list[str]:
    """A row for each training: of index_q, index_k and weights lengths, then cosines, a layer's least in brackets."""
    first = records[0]["length"]
    rows = [
        [
            f"{record['steps']}", f"{record['kl']:.3f}",
            ", ".join(f"{record['length'][x] / first[x]:.2g}" for x in GRADIENTS),
            *(
                ", ".join(f"{record['cosine'][name][x]:.4f} ({record['least_cosine'][name][x]:.3f})" for x in GRADIENTS)
                for name in VARIANTS
            ),
        ]
        for record in records
    ]  # fmt: skip
    return table(f"steps | KL, nats | lengths | {' | '.join(NAMES.values())}", rows)


if __name__ == "__main__":
    main()
