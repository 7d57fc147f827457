"""The model of docs/costs.md: its counts against known sizes, its sums, and that the pages say what it gives."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

KNOWN = {"135m": 134_515_008, "8b": 8_030_261_248, "70b": 70_553_706_496, "671b": 671_026_419_200}
"""Parameters of the published checkpoints, multi-token prediction left out."""


@pytest.fixture(scope="module")
def rates(costs: ModuleType) -> Any:
    return costs.measured()


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_those_of_the_published_models(costs: ModuleType, name: str) -> None:
    assert costs.MODELS[name].parameters == pytest.approx(KNOWN[name], rel=3e-4)  # norms are not counted


def test_a_token_passes_the_published_part_of_the_experts(costs: ModuleType) -> None:
    model = costs.MODELS["671b"]
    output = model.tables // 2 * model.hidden
    assert model.passed + output == pytest.approx(37e9, rel=0.02)  # "37B activated", DeepSeek-V3 technical report


def test_the_smallest_model_has_the_matrices_of_its_config(costs: ModuleType) -> None:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = {name: x.numel() for name, x in model.named_parameters() if x.ndim == 2}
    counted = costs.MODELS["135m"]
    assert counted.parameters == sum(matrices.values())
    assert counted.passed == sum(n for name, n in matrices.items() if ".layers." in name)


def test_the_loss_is_the_record_where_the_sizes_are_the_record_s(costs: ModuleType, rates: Any) -> None:
    record = rates.kernels["gqa32"]
    assert (record["size"]["H"], record["size"]["I"], record["size"]["E"]) == (32, 16, 64)
    loss = costs.counted(costs.MODELS["8b"], record["pairs"], 1, rates)["loss"] / rates.heat
    assert loss * 1e3 == pytest.approx(record["ours"]["p50"], rel=0.03)


def test_the_measured_step_is_given_back(costs: ModuleType, rates: Any) -> None:
    plan = costs.Plan(rates.step_tokens, 1, 1, False)
    each = costs.cost(costs.MODELS["135m"], plan, rates)
    assert sum(each.parts.values()) == pytest.approx(rates.step, rel=1e-9)
    assert costs.rest(rates) > 0 and each.parts["exchange"] == 0
    assert each.hours == pytest.approx(rates.step * costs.SEQUENCES * costs.STEPS / 3600)


def test_fsdp_shares_the_weights_and_pays_for_it(costs: ModuleType, rates: Any) -> None:
    model = costs.MODELS["70b"]
    whole, shared = (costs.cost(model, costs.Plan(32768, 8, 1, fsdp), rates) for fsdp in (False, True))
    assert shared.memory["weights"] == pytest.approx(whole.memory["weights"] / 8)
    assert whole.parts["exchange"] == 0
    assert shared.parts["exchange"] == pytest.approx(2 * model.parameters * 7 / 8 / rates.links)


def test_context_parallelism_shares_pairs_and_gathers_keys(costs: ModuleType, rates: Any) -> None:
    model = costs.MODELS["8b"]
    alone, pair = (costs.cost(model, costs.Plan(65536, 16 * cp, cp, False), rates) for cp in (1, 2))
    assert pair.parts["loss"] == pytest.approx(alone.parts["loss"] / 2)
    assert pair.parts["attention"] == pytest.approx(alone.parts["attention"] / 2)
    assert pair.parts["exchange"] == pytest.approx(32 * 65536 * 8 * 256 * 2 / 2 / rates.links)
    assert alone.forwards == pair.forwards == 1


def test_the_pages_say_what_the_records_give(costs: ModuleType, rates: Any) -> None:
    for document, make in zip(costs.DOCUMENTS, (costs.section, costs.overview), strict=True):
        assert make(rates) in document.read_text(encoding="utf-8"), "run python benchmarks/costs.py"


def test_more_memory_than_a_card_has_is_said(costs: ModuleType, rates: Any) -> None:
    rows = costs.overview(rates).splitlines()
    for name, each in costs.costs(rates).items():
        (row,) = (line for line in rows if line.startswith(f"| {costs.MODELS[name].title} |"))
        assert ("more than the 80 GB" in row) == (each.gigabytes > 80)
