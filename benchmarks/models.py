"""Which models of Transformers can be attached, and whether their teacher is right: docs/models.md from a try of each.

    python benchmarks/models.py            tries every type of causal language model, records all, writes docs/models.md
    python benchmarks/models.py llama      tries these and prints the verdicts; records nothing
    python benchmarks/models.py --beside   tries all with another version of Transformers; the page says what differs

Every type is built tiny, with random weights, once for eager attention and once for attaching. "right" means that,
alone and as packed documents, every attached layer's target distribution is that of the float64 mean of eager's own
`output_attentions`, its KL the one that follows from it by definition, and the model's output eager's.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

from flash_indexer.judge.capture import WORKSPACE, chunk_teacher, chunks
from flash_indexer.models.attach import IndexerHandle, LayerCapture, attach
from flash_indexer.models.layers import spans
from model_configs import tiny_config

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "models.jsonl", ROOT / "docs" / "models.md"
VERDICTS = ("right", "wrong", "refused", "crash", "not built")
LENGTH, LARGEST = 24, 8_500_000
"""Tokens of a try; parameters that a tiny model may have."""
CLOSE = 2e-5
"""Largest difference of a probability; outputs may differ by 10 times as much of their largest value."""
BATCHES = {"one document": [LENGTH], "documents": [9, 1, LENGTH - 10]}


class Verdict(NamedTuple):
    """How a try of one type ended."""

    model_type: str
    verdict: str  # right, wrong, refused, crash, or not built
    text: str
    layers: list[int]
    error: float | None


def build(model_type: str, implementation: str | None) -> PreTrainedModel:
    """The type's tiny model with the same random weights at every call."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"the smallest configuration tried has {count:,} parameters")
    torch.manual_seed(0)
    options = {} if implementation is None else dict(attn_implementation=implementation)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(noise * 0.8 / tensor.shape[-1] ** 0.5)
            else:
                tensor.add_(noise * (1.0 if "sink" in name else 0.05))
    return model.eval()


def inputs(lengths: list[int]) -> dict[str, Tensor]:
    """One row of documents."""
    ids = torch.randint(3, 60, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    if len(lengths) == 1:
        return dict(input_ids=ids)
    return dict(input_ids=ids, position_ids=torch.cat([torch.arange(n) for n in lengths])[None])


@torch.no_grad()
def eager(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the attention weights [H, L, L] that modules return, by the modules' names."""
    found: dict[str, Tensor] = {}
    length = batch["input_ids"].shape[1]

    def listen(name: str, output: Any) -> None:
        for part in output if isinstance(output, tuple) else ():
            if isinstance(part, Tensor) and part.ndim == 4 and part.shape[-2:] == (length, length):
                found.setdefault(name, part[0].double())

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: listen(name, output))
        for name, module in model.named_modules()
    ]
    try:
        logits = model(**batch, use_cache=False, output_attentions=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits.double(), found


def target_of(weights: Tensor) -> Tensor:
    """p[t,s] = sum_h a[t,h,s] / sum_s sum_h a[t,h,s]: [H, L, L] -> [L, L]."""
    total = weights.sum(0)
    return total / total.sum(-1, keepdim=True)


def attached_target(capture: LayerCapture) -> Tensor:
    """The same of an attached layer, by the operator that the loss takes it from."""
    p = torch.zeros(capture.q.shape[0], capture.k.shape[0], dtype=torch.float64)
    for rows, keys, start, end in chunks(capture, WORKSPACE):
        p[rows, keys] = chunk_teacher(capture, rows, keys, start, end).double()
    return p / p.sum(-1, keepdim=True)


def with_sinks(weights: Tensor, capture: LayerCapture) -> Tensor:
    """Attention weights that leave a head's sink out, with it: by definition, from the captured queries and keys."""
    if capture.sinks is None or bool((weights.sum(-1) < 1 - 1e-4).any()):
        return weights
    q, k = capture.q.double(), capture.k.double().repeat_interleave(capture.q.shape[1] // capture.k.shape[1], 1)
    s = torch.arange(k.shape[0])
    seen = (s >= capture.key_start[:, None]) & (s < capture.key_end[:, None])
    logits = torch.einsum("thd,shd->hts", q, k) * capture.softmax_scale
    lse = logits.masked_fill(~seen, -torch.inf).logsumexp(-1)
    return weights * (lse - capture.sinks.double()[:, None]).sigmoid()[..., None]


def defined_kl(p: Tensor, capture: LayerCapture) -> float:
    """mean over t of KL(p[t] || softmax(i[t])) over the keys of a causal document, by definition, in float64."""
    index_q, index_k, weights = (x.double() for x in (capture.index_q, capture.index_k, capture.index_weights))
    scores = (weights[:, :, None] * torch.einsum("tie,se->tis", index_q, index_k).relu()).sum(1)
    s = torch.arange(p.shape[1])
    seen = (s >= capture.key_start[:, None]) & (s < capture.key_end[:, None])
    log_q = scores.masked_fill(~seen, -torch.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return float((torch.xlogy(p, p) - p * log_q).sum(-1).mean())


def module_names(model: PreTrainedModel, handle: IndexerHandle) -> Iterator[tuple[int, str]]:
    """Each layer that an indexer serves and the name of the module that its teacher is."""
    names = {id(module): name for name, module in model.named_modules()}
    for layer in handle.sources:
        yield layer, names[id(handle.attentions[layer])]


def alone(model: PreTrainedModel, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """`eager` of every document by itself."""
    batch = inputs(lengths)
    documents = zip(*(batch[name].split(lengths, 1) for name in ("input_ids", "position_ids")), strict=True)
    parts = [eager(model, dict(input_ids=ids, position_ids=positions)) for ids, positions in documents]
    weights: dict[str, Tensor] = {}
    for name in parts[0][1]:
        heads = [part[1][name] for part in parts]
        weights[name] = torch.stack([torch.block_diag(*[x[h] for x in heads]) for h in range(heads[0].shape[0])])
    return torch.cat([part[0] for part in parts], 1), weights


def separated(model: PreTrainedModel, lengths: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Eager attention within documents, of a model whose masks know none; layers without attention go on through "
    "them."""
    kinds = getattr(model.config, "layer_types", None) or []
    if not any(kind in ("linear_attention", "conv", "hybrid") for kind in kinds):
        return alone(model, lengths)
    seen = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths])
    mask = torch.zeros_like(seen).masked_fill_(seen == 0, torch.finfo(torch.float32).min)
    return eager(model, inputs(lengths) | dict(attention_mask=mask[None, None]))


@torch.no_grad()
def differences(
    handle: IndexerHandle, truth: tuple[Tensor, dict[str, Tensor]], lengths: list[int]
) -> Iterator[tuple[str, float, float]]:
    """What was compared, the difference, and what it may be."""
    batch = inputs(lengths)
    logits, weights = truth
    captures: dict[int, LayerCapture] = {}
    with handle.using(lambda capture: captures.update({capture.layer: capture})):
        got = handle.model(**batch, use_cache=False).logits.double()
    handle.model(**batch, use_cache=False)
    losses, kls = handle.losses(), dict[int, list[float]]()
    for layer, name in module_names(handle.model, handle):
        if name not in weights:
            raise LookupError(f"eager attention of {name} returns no weights")
        p = target_of(with_sinks(weights[name], captures[layer]))
        yield f"layer {layer}'s target", float((attached_target(captures[layer]) - p).abs().max()), CLOSE
        kls.setdefault(handle.sources[layer], []).append(defined_kl(p, captures[layer]))
    for layer, found in kls.items():
        kl = sum(found) / len(found)
        yield f"layer {layer}'s KL", abs(float(losses[layer].kl) - kl), CLOSE * max(1.0, kl)
    yield "the output", float((got - logits).abs().max() / logits.abs().max()), 10 * CLOSE


def attach_any(model: PreTrainedModel) -> IndexerHandle:
    """With fresh indexers, or where the model has some, with its own."""
    try:
        return attach(model, num_heads=3, head_dim=32)
    except ValueError as error:
        if "has indexers of its own" not in str(error):
            raise
    return attach(model, indexers="own")


def noisy_indexers(handle: IndexerHandle) -> None:
    """Scores far from uniform."""
    generator = torch.Generator().manual_seed(5)
    for parameter in handle.indexers.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def attempt(model_type: str) -> Verdict:
    """Builds, attaches and judges one type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _attempt(model_type)


def _attempt(model_type: str) -> Verdict:
    try:
        truth, model = build(model_type, "eager"), build(model_type, None)
        with torch.no_grad():
            model(**inputs([LENGTH]), use_cache=False)
    except Exception as error:  # whatever Transformers does with tiny sizes
        return Verdict(model_type, "not built", first_line(error), [], None)
    try:
        handle = attach_any(model)
    except (TypeError, ValueError) as error:
        return Verdict(model_type, "refused", first_line(error), [], None)
    except Exception as error:
        return Verdict(model_type, "crash", place(error), [], None)
    noisy_indexers(handle)
    return judge(model_type, handle, truth)


def judge(model_type: str, handle: IndexerHandle, truth: PreTrainedModel) -> Verdict:
    """Compares what is attached with eager attention, alone and packed."""
    layers, worst = list(handle.layers), 0.0
    notes = ['its own indexers: `attach(indexers="own")`'] if handle.trains_own else []
    for name, lengths in BATCHES.items():
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                handle.model(**inputs(lengths), use_cache=False)
            by_themselves = any("the documents of a row would see" in str(warning.message) for warning in said)
            if by_themselves:
                notes.append("its own mask knows no documents: judged document by document")
            expected = separated(truth, lengths) if by_themselves else eager(truth, inputs(lengths))
            for what, difference, allowed in differences(handle, expected, lengths):
                if not difference <= allowed:
                    text = f"{name}: {what} differs by {difference:.1e}"
                    return Verdict(model_type, "wrong", text, layers, difference)
                worst = max(worst, difference)
        except ValueError as error:
            verdict = "refused" if name == "one document" else "right"
            notes.append(("first forward: " if verdict == "refused" else f"{name} refused: ") + first_line(error))
            return Verdict(model_type, verdict, "; ".join(notes), layers, worst)
        except Exception as error:
            return Verdict(model_type, "crash", place(error), layers, None)
    return Verdict(model_type, "right", "; ".join(notes), layers, worst)


def first_line(error: BaseException) -> str:
    """The error's kind and the beginning of its text."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def place(error: BaseException) -> str:
    """An error that nobody raised on purpose, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} ({Path(last.filename).name}:{last.lineno})"


def page(verdicts: list[Verdict], version: str, others: Sequence[tuple[list[Verdict], str]] = ()) -> str:
    """docs/models.md. others: records of other versions of Transformers."""
    groups = {name: [x for x in verdicts if x.verdict == name] for name in VERDICTS}
    right = groups["right"]
    worst = max((x.error or 0.0 for x in right), default=0.0)
    lines = [
        "# Models that can be attached",
        "",
        f"Generated by `benchmarks/models.py` with Transformers {version}; do not edit. Every type of causal language "
        "model "
        "was built tiny, with random weights and every kind of layer that it has, and tried: attached, and run on one "
        "document and on three packed ones. *Right* means that each attached layer's target distribution, formed by "
        "the operator, is that of the float64 mean of eager attention's own weights, that its KL follows from it by "
        "definition, and that the model's output stays.",
        "",
        *table("verdict | types", [[name, str(len(found))] for name, found in groups.items() if found]),
        "",
        *(line for other in others for line in (compared(verdicts, *other), "")),
        f"The largest difference of a probability, a KL or an output of those that are right is {worst:.1e}. A model "
        "that is "
        "not in this list, or a modified one, is compared with its own eager attention at its first forward, layer by "
        "layer, and refused where the two differ. That looks at 256 tokens of each layer: with SmolLM2-135M on one "
        "core of a CPU 1.7 s beside a step of 18 s at 2,048 tokens, and 1.6 s beside 320 s at 8,192.",
        "",
        "Layers whose queries see a window or chunk of keys get no indexer by default where others see all keys: a "
        "window bounds their keys already. `attach(layers=[...])` names them.",
        "",
        "## Right",
        "",
        *table("type | layers of the tiny model that get indexers | note", [
            [f"`{x.model_type}`", spans(x.layers), x.text or ""] for x in right
        ]),
    ]  # fmt: skip
    for name, title in (("wrong", "Wrong"), ("refused", "Refused"), ("crash", "Crashed"), ("not built", "Not tried")):
        if groups[name]:
            rows = [[f"`{x.model_type}`", reason(x.text)] for x in groups[name]]
            lines += ["", f"## {title}", "", *table("type | why", rows)]
    return "\n".join(lines) + "\n"


def compared(verdicts: list[Verdict], others: list[Verdict], version: str) -> str:
    """What another version of Transformers changes."""
    before, after = ({x.model_type: x.verdict for x in found} for found in (verdicts, others))
    right = sum(verdict == "right" for verdict in after.values())
    changes = [
        f"`{x}` was {before[x]}, is {after[x]}" for x in sorted(before.keys() & after.keys()) if before[x] != after[x]
    ]
    news = [f"`{name}` {after[name]}" for name in sorted(after.keys() - before.keys())]
    gone = [f"`{name}`" for name in sorted(before.keys() - after.keys())]
    parts = [("other verdicts", changes), ("new", news), ("gone", gone)]
    said = "; ".join(f"{title}: {', '.join(found)}" for title, found in parts if found) or "all as above"
    return f"With Transformers {version} {right} of {len(after)} types are right. {said[0].upper()}{said[1:]}."


def reason(text: str) -> str:
    """What is in the way, without the sentence before it."""
    found = re.search(r"docs/models.md; got .*? none can be a teacher \((.*)\)$", text)
    return text.removeprefix("attach: ") if found is None else found[1]


def table(titles: str, rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    names = titles.split(" | ")
    return [
        f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (names, ["---"] * len(names), *rows)
    ]


def recorded(path: Path = RESULTS) -> tuple[list[Verdict], str]:
    """The verdicts of the last run over all types, and its version of Transformers."""
    head, *rest = path.read_text(encoding="utf-8").splitlines()
    return [Verdict(**json.loads(line)) for line in rest], json.loads(head)["transformers"]


def recorded_beside() -> list[tuple[list[Verdict], str]]:
    """The same of other versions."""
    return [recorded(path) for path in sorted(RESULTS.parent.glob("models-*.jsonl"))]


def main() -> None:
    """Tries the types that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--beside", action="store_true", help="record as another version of Transformers")
    options = parser.parse_args()
    names = options.types
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = []
    for model_type in names or sorted(TYPES):
        verdicts.append(verdict := attempt(model_type))
        print(json.dumps(verdict._asdict()), flush=True)
    print({name: sum(x.verdict == name for x in verdicts) for name in VERDICTS}, file=sys.stderr)
    if not names:
        head = dict(transformers=transformers.__version__, torch=torch.__version__)
        lines = [json.dumps(x) for x in (head, *(verdict._asdict() for verdict in verdicts))]
        beside = RESULTS.with_name(f"models-{transformers.__version__}.jsonl")
        (beside if options.beside else RESULTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
        PAGE.write_text(page(*recorded(), recorded_beside()), encoding="utf-8")


if __name__ == "__main__":
    main()
