"""The table of models: what is tried is right, a wrong teacher is called wrong, and the page is the record's."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flash_indexer.models import handle, layer_mask, verification

MOST_USED = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_text", "mistral", "mixtral", "gemma2", "gemma3_text",
    "phi3", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe", "olmo3", "granitemoehybrid", "smollm3", "minimax",
    "lfm2",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(scripts: Path) -> ModuleType:
    return importlib.import_module("models")


@pytest.mark.parametrize("model_type", MOST_USED)
def test_the_most_used_are_right(models: ModuleType, model_type: str) -> None:
    verdict = models.attempt(model_type)
    assert verdict.verdict == "right", verdict.text
    assert "refused" not in verdict.text


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_those_with_indexers_of_their_own_are_right(models: ModuleType, model_type: str) -> None:
    verdict = models.attempt(model_type)
    assert verdict.verdict == "right" and "its own indexers" in verdict.text, verdict.text


def test_a_window_that_is_left_out_is_refused(models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before windows were read from masks: refused; without the comparison at the first forward, called wrong."""
    hidden = property(lambda self: None, lambda self, value: None)
    monkeypatch.setattr(layer_mask.LayerMask, "window", hidden, raising=False)
    assert "the teacher must be the model's own attention" in models.attempt("qwen2_moe").text
    monkeypatch.setattr(verification.Verification, "conclude", lambda self: None)
    assert models.attempt("qwen2_moe").verdict == "wrong"


@pytest.mark.parametrize(("change", "what"), [("lse", "target"), ("out", "differs"), ("kl", "KL")])
def test_the_judge_sees_what_is_wrong(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch, change: str, what: str
) -> None:
    right, kl = handle.causal_attention, handle.layer_kl

    def attention(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(*args, **options)
        heads = torch.linspace(0.99, 1.01, lse.shape[1])
        return (out * 1.001, lse) if change == "out" else (out, lse * heads if change == "lse" else lse)

    monkeypatch.setattr(handle, "causal_attention", attention)
    if change == "kl":
        monkeypatch.setattr(handle, "layer_kl", lambda *args, **options: kl(*args, **options)._replace(
            kl=kl(*args, **options).kl * 1.001))  # fmt: skip
    verdict = models.attempt("llama")
    assert verdict.verdict == "wrong" and what in verdict.text


def test_what_another_version_changes_is_said(models: ModuleType) -> None:
    before = [models.Verdict(name, "right", "", [0], 0.0) for name in ("a", "b")]
    after = [before[0], before[1]._replace(verdict="refused"), models.Verdict("c", "right", "", [0], 0.0)]
    assert models.compared(before, before, "9") == "With Transformers 9 2 of 2 types are right. All as above."
    assert models.compared(before, after, "9") == (
        "With Transformers 9 2 of 3 types are right. Other verdicts: `b` was right, is refused; new: `c` right."
    )
    assert models.compared(after, before, "9").endswith("`b` was refused, is right; gone: `c`.")


def test_the_page_is_made_from_the_record(models: ModuleType) -> None:
    verdicts, version = models.recorded()
    others = models.recorded_beside()
    assert models.PAGE.read_text(encoding="utf-8") == models.page(verdicts, version, others)
    assert [version for _, version in others] == ["5.24.0"] and all(x.verdict != "wrong" for x in others[0][0])
    found = {verdict.model_type: verdict.verdict for verdict in verdicts}
    assert not {"wrong", "crash"} & set(found.values())
    assert sum(verdict == "right" for verdict in found.values()) >= 85
    assert all(found[model_type] == "right" for model_type in MOST_USED)
