"""Dense, sparse before and sparse after: the losses, the error bars, what changed, and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from flash_indexer.judge.batches import TokenLosses
from flash_indexer.judge.comparison import (
    AFTER,
    BEFORE,
    CONTROL,
    DENSE,
    Comparison,
    Measures,
    compare,
    measure,
    paired_difference,
)
from flash_indexer.judge.comparison_report import comparison_lines, write_comparison
from flash_indexer.judge.evaluation import evaluate
from flash_indexer.models.attach import IndexerHandle, attach

K = 6


def handle(seed: int = 0, last_layer: int = 0) -> IndexerHandle:
    """The model of `seed`; the indexer of its last layer drawn from `last_layer`."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=2))
    for name, x in sorted(model.state_dict().items()):
        if "norm" not in name:
            x.copy_(torch.randn(x.shape) * 0.3)
    found = attach(model.eval(), num_heads=3, head_dim=32)
    for name, indexer in found.indexers.items():
        generator = torch.Generator().manual_seed(last_layer if name == "2" else 9)
        for parameter in indexer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return found


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    positions = torch.cat([torch.arange(11), torch.arange(29)])[None]
    return [
        dict(input_ids=torch.randint(0, 61, (n, 40), generator=generator), position_ids=positions.expand(n, -1))
        for n in (1, 2)
    ]


def test_losses_masses_and_ties_are_those_of_the_evaluation() -> None:
    before, after = measure(handle(), batches(), K), measure(handle(seed=1), batches(), K)
    found = compare(before, after)
    for seed, dense, sparse in ((0, DENSE, BEFORE), (1, CONTROL, AFTER)):
        judged = evaluate(handle(seed=seed), batches(), ks=(K,), perplexity_ks=(K,))
        for variant, selection in ((dense, "dense"), (sparse, "indexer")):
            want = next(x for x in judged.perplexities if x.selection == selection)
            assert found.overall(variant).nats == pytest.approx(want.loss, rel=1e-5)
        for layer, score in zip(found.layers, judged.layers, strict=True):
            at_k, side = score.at_k[0], "before" if seed == 0 else "after"
            assert getattr(layer, f"mass_{side}") == pytest.approx(at_k.indexer, rel=1e-5)
    assert found.overall(DENSE).difference == 0 and found.overall(DENSE).tokens == 3 * 38
    parts = [x for x in found.losses if x.variant == AFTER and x.end is not None]
    assert [(x.begin, x.end) for x in parts] == [(0, 6), (6, 12), (12, 24), (24, 48)]
    assert sum(x.tokens for x in parts) == 114
    first = next(x for x in found.losses if x.variant == BEFORE and x.end == K)  # all keys are selected
    assert first.difference == pytest.approx(0, abs=1e-5)
    assert found.mean.kl_before == pytest.approx(sum(x.kl_before for x in found.layers) / 3)


def test_only_the_layer_that_has_another_indexer_selects_others() -> None:
    before = measure(handle(), batches(), K)
    assert [x.changed for x in compare(before, measure(handle(), batches(), K)).layers] == [0, 0, 0]
    found = compare(before, measure(handle(last_layer=4), batches(), K))
    assert [x.changed for x in found.layers[:2]] == [0, 0] and 0.5 < (found.layers[2].changed or 0) <= 1
    assert (
        found.overall(CONTROL).difference == 0 and found.overall(AFTER).difference != found.overall(BEFORE).difference
    )


def made(nats: list[float], sequence: list[int]) -> Measures:
    losses = TokenLosses(
        torch.tensor(nats, dtype=torch.float64), torch.ones(len(nats), dtype=torch.int64), torch.tensor(sequence)
    )
    return Measures(4, losses, losses, {}, {}, [], [])


def test_the_error_is_that_of_a_ratio_over_sequences() -> None:
    """Differences 1, 3 | 5 | 0, 0, 6."""
    sequence = [0, 0, 1, 2, 2, 2]
    base, other = made([0.0] * 6, sequence), made([1.0, 3.0, 5.0, 0.0, 0.0, 6.0], sequence)
    loss = compare(base, other).overall(AFTER)
    assert loss.difference == pytest.approx(2.5)
    spread = [4 - 2 * 2.5, 5 - 2.5, 6 - 3 * 2.5]
    assert loss.error == pytest.approx(math.sqrt(3 / 2 * sum(x * x for x in spread)) / 6)
    assert compare(made([1.0], [0]), made([2.0], [0])).overall(AFTER).error is None


def test_measures_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="must be measured on the same batches and topk"):
        compare(made([1.0], [0]), made([1.0, 2.0], [0, 0]))
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        measure(handle(), [], K)
    broken = handle()
    broken.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's loss must be finite"):
        measure(broken, batches(), K)


def test_the_page_the_plot_and_the_lines(tmp_path: Path) -> None:
    found = compare(measure(handle(), batches(), K), measure(handle(seed=1), batches(), K))
    page = write_comparison(tmp_path / "report", found, "flash-indexer evaluate --run x")
    text = page.read_text()
    for variant in (DENSE, BEFORE, AFTER, CONTROL):
        assert f"| {variant} | all | 114 |" in text and f"| {variant} | 24–47 |" in text
    assert "flash-indexer evaluate --run x" in text and all(line in text for line in comparison_lines(found))
    assert text.count("\n| 0 |") + text.count("\n| 1 |") + text.count("\n| 2 |") == 3 and "\n| mean |" in text
    assert (tmp_path / "report" / "comparison.png").stat().st_size > 10_000
    numbers = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert numbers == json.loads(json.dumps(found.to_dict())) and isinstance(found, Comparison)


def test_the_error_is_that_of_a_mean_of_clusters_of_tokens() -> None:
    """Unequal sequences, the third without a token; one sequence alone has no error."""
    draw = torch.Generator().manual_seed(0)
    sequence = torch.arange(7).repeat_interleave(torch.tensor([3, 9, 0, 4, 8, 2, 6]))
    x = torch.randn(32, generator=draw, dtype=torch.float64) + sequence
    mean = float(x.mean())
    sums = [float((x[sequence == n] - mean).sum()) ** 2 for n in range(7) if n != 2]
    expected = (6 / 5 * sum(sums)) ** 0.5 / 32
    assert paired_difference(x, sequence) == (pytest.approx(mean), pytest.approx(expected))
    assert paired_difference(x[:3], sequence[:3]) == (pytest.approx(float(x[:3].mean())), None)
