"""The needle test: where the fact stands, what is asked, and that a model that copies it is found out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from flash_indexer.judge.needle import DEPTHS, needle_scores, needles

VOCABULARY = 256


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    """A token for each character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({character: n for n, character in enumerate(alphabet)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture
def filler(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    return torch.tensor(tokenizer("x" * 500)["input_ids"])


class Copier(nn.Module):
    """Gives the tokens that followed the last seven the time before, within `reach` tokens."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.anchor, self.reach = nn.Parameter(torch.zeros(1)), reach

    def forward(self, ids: Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*ids.shape, VOCABULARY)
        for t in range(8, ids.shape[1]):
            for s in range(t - 1, max(6, t - self.reach), -1):
                if torch.equal(ids[0, s - 6 : s + 1], ids[0, t - 6 : t + 1]):
                    logits[0, t, ids[0, s + 1]] = 20.0
                    break
        return SimpleNamespace(logits=logits)


def test_the_fact_stands_at_its_depth_and_is_asked_for_at_the_end(
    tokenizer: PreTrainedTokenizerFast, filler: Tensor
) -> None:
    made = needles(tokenizer, filler, length=300, count=2, seed=1)
    assert [x.depth for x in made] == [*DEPTHS, *DEPTHS] and all(len(x.ids) == 300 for x in made)
    for x in made:
        text = tokenizer.decode(x.ids)
        code = text[-5:]
        assert text[-x.answer :] == f" {code}" and text.count(f" is {code}") == 2
        before = text.index("The pass code of")
        hay = text.count("x", 0, before)
        assert hay == int(x.depth * text.count("x")) and text[:hay] == "x" * hay
    assert len({tokenizer.decode(x.ids)[-5:] for x in made}) == 6


def test_a_model_that_sees_the_fact_finds_it_and_one_that_does_not_misses_it(
    tokenizer: PreTrainedTokenizerFast, filler: Tensor
) -> None:
    made = needles(tokenizer, filler, length=200, count=1)
    everywhere = needle_scores(Copier(200), made)
    assert [x.found for x in everywhere] == [1, 1, 1] and all(x.nats < 1e-3 for x in everywhere)
    near = needle_scores(Copier(100), made)
    assert [x.found for x in near] == [0, 1, 1] or [x.found for x in near] == [0, 0, 1]
    assert near[0].nats > 1 and [x.depth for x in near] == list(DEPTHS)


def test_too_short_a_document_is_refused(tokenizer: PreTrainedTokenizerFast, filler: Tensor) -> None:
    for hay, length in ((filler, 60), (filler[:10], 300)):
        with pytest.raises(ValueError, match="needles: length must leave room"):
            needles(tokenizer, hay, length=length, count=1)
