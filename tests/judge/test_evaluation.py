"""judge.evaluation on a small attached model, against the same model without indexers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from flash_indexer import reference
from flash_indexer.judge.evaluation import evaluate
from flash_indexer.judge.metrics import MetricSums, layer_sums
from flash_indexer.judge.scores import Evaluation, score
from flash_indexer.models.attach import IndexerHandle, LayerCapture

K = 8
Batches = list[dict[str, Tensor]]
Lengths = tuple[list[int], ...]
Perplexity = Callable[[Callable[[int], Tensor]], float]


@pytest.fixture
def masked_perplexity(make_model: Callable[[], LlamaForCausalLM], batches: Batches, lengths: Lengths) -> Perplexity:
    """The model without indexers, document by document, under its own eager attention with a mask.

    Its argument choose(n) gives the bool [n, n] mask of keys each query of a document of n tokens may see.
    """
    model = make_model().eval()
    documents = [
        document
        for ids, row in zip([ids for batch in batches for ids in batch["input_ids"]], lengths, strict=True)
        for document in ids.split(row)
    ]

    def perplexity(choose: Callable[[int], Tensor]) -> float:
        total, count = 0.0, 0
        for document in documents:
            n = len(document)
            if n > 1:
                mask = torch.zeros(1, 1, n, n).masked_fill(~choose(n), torch.finfo(torch.float32).min)
                with torch.no_grad():
                    logits = model(input_ids=document[None], attention_mask=mask, use_cache=False).logits[0]
                total += float(cross_entropy(logits[:-1], document[1:], reduction="sum"))
                count += n - 1
        return math.exp(total / count)

    return perplexity


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def sink_and_window(n: int) -> Tensor:
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return causal(n) & ((torch.arange(n) < 4) | (distance < K - 4))


def first_keys(n: int) -> Tensor:
    """What an indexer whose scores all tie chooses: the earliest K keys."""
    return causal(n) & (torch.arange(n) < K)


def perplexities(evaluation: Evaluation) -> dict[tuple[str, int | None], float]:
    return {(p.selection, p.k): p.perplexity for p in evaluation.perplexities}


def test_perplexities_equal_the_models_own_under_masks(
    handle: IndexerHandle, masked_perplexity: Perplexity, batches: Batches
) -> None:
    with torch.no_grad():
        for indexer in handle.indexers.values():
            indexer.weights_proj.weight.zero_()
    found = perplexities(evaluate(handle, batches, ks=(4,), perplexity_ks=(K, 40)))
    dense = masked_perplexity(causal)
    assert found["dense", None] == pytest.approx(dense, rel=1e-5)
    assert found["window", K] == pytest.approx(masked_perplexity(sink_and_window), rel=1e-5)
    assert found["indexer", K] == pytest.approx(masked_perplexity(first_keys), rel=1e-5)
    assert len({round(value, 4) for value in found.values()}) == 4, "the cases must differ to tell anything"
    assert not any(k == 40 for _, k in found), "no query sees more than 40 keys: left out"


@pytest.mark.parametrize("select", ["indexer", "oracle"])
def test_sparse_passes_replace_every_layers_attention(handle: IndexerHandle, select: str, batches: Batches) -> None:
    """Against a consumer that masks whole [T, S] matrices, layer after layer."""

    def attend(c: LayerCapture) -> Tensor:
        visible = reference.visible_keys(c.key_start, c.key_end, c.k.shape[0])
        p = reference.target_distribution(c.q, c.k, c.softmax_scale, c.key_start, c.key_end)
        i = reference.indexer_scores(c.index_q, c.index_k, c.index_weights, c.key_start, c.key_end)
        ranked = (i if select == "indexer" else p).masked_fill(~visible, -torch.inf)
        keys = ranked.argsort(descending=True, stable=True)[:, :K]
        chosen = torch.zeros_like(visible).scatter(1, keys, True) & visible
        logits = reference.teacher_logits(c.q, c.k, c.softmax_scale).masked_fill(~chosen[:, None], -torch.inf)
        return torch.einsum("ths,shv->thv", logits.softmax(-1), c.v.repeat_interleave(3, 1))

    found = perplexities(evaluate(handle, batches, ks=(), perplexity_ks=(K,)))
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad(), handle.using(attend):
            logits = handle.model(**batch, use_cache=False).logits[:, :-1]
        targets = batch["input_ids"][:, 1:].masked_fill(batch["position_ids"][:, 1:] == 0, -100)
        total += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += int((targets != -100).sum())
    assert found[select, K] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_metrics_are_those_of_each_layers_captures(handle: IndexerHandle, batches: Batches, lengths: Lengths) -> None:
    sums: dict[int, MetricSums] = {}

    def measure(capture: LayerCapture) -> None:
        sums[capture.layer] = sums.get(capture.layer, MetricSums()) + layer_sums(capture, ks=(4, 8, 16), min_visible=20)

    with torch.no_grad(), handle.using(measure):
        for batch in batches:
            handle.model(**batch, use_cache=False)
    evaluation = evaluate(handle, batches, ks=(4, 8, 16), min_visible=20, perplexity_ks=())
    assert evaluation.layers == tuple(score(layer, sums[layer]) for layer in (0, 1, 2))
    mean = evaluation.mean
    assert mean.kl_over_uniform == pytest.approx(
        sum(s.kl for s in evaluation.layers) / sum(s.uniform_kl for s in evaluation.layers)
    )
    assert [(at.k, at.min_visible) for at in mean.at_k] == [(4, 20), (8, 32)]
    queries = [sum(max(0, n - least + 1) for row in lengths for n in row) for least in (20, 32)]
    assert [at.queries for at in mean.at_k] == [3 * n for n in queries]
    for at in mean.at_k:
        layers = [mass for s in evaluation.layers for mass in s.at_k if mass.k == at.k]
        assert at.indexer == pytest.approx(sum(mass.indexer for mass in layers) / 3)
        assert at.indexer_over_oracle == pytest.approx(at.indexer / at.oracle)
        assert at.window_over_oracle == pytest.approx(at.window / at.oracle)
    assert (evaluation.sequences, evaluation.tokens) == (3, 120)
    assert evaluation.predicted == sum(n - 1 for row in lengths for n in row)
    assert len(evaluation.perplexities) == 1


def test_sparse_fraction_counts_the_queries_that_lose_keys(
    handle: IndexerHandle, batches: Batches, lengths: Lengths
) -> None:
    evaluation = evaluate(handle, batches, ks=(), perplexity_ks=(K,))
    expected = sum(max(0, n - K) for row in lengths for n in row) / 120
    assert evaluation.perplexities[1].sparse_fraction == pytest.approx(expected)
    assert evaluation.perplexities[0].sparse_fraction == 0


def test_json_round_trip(handle: IndexerHandle, batches: Batches) -> None:
    evaluation = evaluate(handle, batches, ks=(4, 8), perplexity_ks=(K,))
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))) == evaluation
    assert evaluation.row_block.layer in handle.layers


def test_the_model_is_left_as_it_was(handle: IndexerHandle, batches: Batches) -> None:
    model, batch = handle.model, batches[1]
    before = {name: value.clone() for name, value in handle.state_dict().items()}
    seen: list[tuple[int, int | None]] = []
    for training in (True, False):
        model.train(training)
        evaluate(handle, [batch], ks=(4,), perplexity_ks=(K,), progress=lambda done, total: seen.append((done, total)))
        assert model.training is training
    assert seen == 2 * [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(torch.equal(value, before[name]) for name, value in handle.state_dict().items())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *handle.indexers.parameters()])


def test_unusable_input_is_refused(handle: IndexerHandle, batches: Batches) -> None:
    batch = batches[1]
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        evaluate(handle, iter([]))
    with pytest.raises(KeyError, match=r"must hold input_ids and position_ids, got \['input_ids'\]"):
        evaluate(handle, [{"input_ids": batch["input_ids"]}])
    with pytest.raises(ValueError, match="a document of two tokens or more, got none"):
        evaluate(handle, [{**batch, "position_ids": torch.zeros_like(batch["position_ids"])}])
    with pytest.raises(ValueError, match=r"input_ids must be \[B, L\] with a token at least, got \[1, 0\]"):
        evaluate(handle, [{name: x[:1, :0] for name, x in batch.items()}])
    mask = torch.ones_like(batch["input_ids"])
    assert evaluate(handle, [{**batch, "attention_mask": mask}]) == evaluate(handle, [batch])
    mask[0, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask must be all ones, got zeros in it; pack documents"):
        evaluate(handle, [{**batch, "attention_mask": mask}])


def test_what_is_asked_for_twice_is_counted_once(handle: IndexerHandle, batches: Batches) -> None:
    batches = batches[1:]
    assert evaluate(handle, batches, perplexity_ks=(4, 4)) == evaluate(handle, batches, perplexity_ks=(4,))
    for wrong in (dict(perplexity_ks=(0,)), dict(min_visible=-1)):
        with pytest.raises(ValueError, match="min_visible must be 0 or more, perplexity_ks 1 or more, got"):
            evaluate(handle, batches, **wrong)  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_are_refused(handle: IndexerHandle, batches: Batches) -> None:
    batch, head = batches[1], handle.model.lm_head.weight
    with torch.no_grad():
        before = head[0, 0].clone()
        head[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the model's loss is nan; its weights or its activations are not finite"):
        evaluate(handle, [batch])
    with torch.no_grad():
        head[0, 0] = before
        handle.indexers["1"].wk.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the KL of layer 1 is nan"):
        evaluate(handle, [batch])
