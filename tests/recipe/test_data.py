"""Packing, judged by a token-by-token walk over the stream, and what is told of the text."""

from __future__ import annotations

import datasets
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from flash_indexer.recipe import data
from flash_indexer.recipe.data import PackedDataset, describe, length_warning, pack

EOS, BOS, WORDS = 0, 1, 5000


class CountingTokenizer(PreTrainedTokenizerFast):
    """Counts the texts and characters it is asked to tokenise."""

    texts = 0
    characters = 0

    def __call__(self, text, **options):
        self.texts += len(text)
        self.characters += sum(map(len, text))
        return super().__call__(text, **options)


def tokenizer(**special: str) -> CountingTokenizer:
    """A word is `w<n>`, with id n + 2; whitespace is nothing."""
    vocabulary = {"<eos>": EOS, "<bos>": BOS} | {f"w{n}": n + 2 for n in range(WORDS)} | {"?": WORDS + 2}
    model = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = Split(Regex(r"\s+"), "removed")
    return CountingTokenizer(tokenizer_object=model, **(special or {"eos_token": "<eos>"}))


def numbered(*lengths: int) -> datasets.Dataset:
    """Documents of the given lengths in which no word occurs twice."""
    words = iter(range(WORDS))
    return datasets.Dataset.from_dict({"text": ["\n".join(f"w{next(words)}" for _ in range(n)) for n in lengths]})


def ids(documents: datasets.Dataset) -> list[list[int]]:
    return [[int(word[1:]) + 2 for word in text.split()] for text in documents["text"]]


def stream(packed: PackedDataset) -> list[int]:
    return torch.cat([packed[n]["input_ids"] for n in range(len(packed))]).tolist()


def items_equal(one: PackedDataset, other: PackedDataset) -> bool:
    return len(one) == len(other) and all(
        torch.equal(one[n][key], other[n][key]) for n in range(len(one)) for key in one[n]
    )


def test_the_share_of_tokens_that_see_more_keys_is_that_of_their_positions() -> None:
    tokens, starts = torch.zeros(60, dtype=torch.int32), torch.tensor([0, 7, 8, 31])
    packed = PackedDataset(tokens, starts, 20)
    positions = torch.cat([packed[n]["position_ids"] for n in range(len(packed))])
    for keys in (1, 5, 8, 12, 20):
        assert packed.share_that_sees_more(keys) == pytest.approx((positions >= keys).double().mean().item())


@pytest.mark.parametrize("length", [1, 7, 64, 500])
@pytest.mark.parametrize("seed", [0, 1])
def test_packing_keeps_every_token_and_every_boundary(length: int, seed: int) -> None:
    documents = numbered(1, 63, 2, 500, 7, 1, 301, 64, 13)
    packed = pack(documents, tokenizer(), sequence_length=length, seed=seed)
    originals = ids(documents)
    total = sum(map(len, originals)) + len(originals)
    assert len(packed) == total // length

    rest, position, pieces = stream(packed), 0, [[]]
    for n in range(len(packed)):
        item = packed[n]
        assert {key: (value.dtype, list(value.shape)) for key, value in item.items()} == {
            "input_ids": (torch.int64, [length]),
            "position_ids": (torch.int64, [length]),
        }
        position = 0
        for token, got in zip(item["input_ids"].tolist(), item["position_ids"].tolist(), strict=True):
            assert got == position
            position = 0 if token == EOS else position + 1
    for token in rest:
        pieces[-1].append(token)
        if token == EOS:
            pieces.append([])
    whole, last = [piece[:-1] for piece in pieces[:-1]], pieces[-1]
    assert all(piece in originals for piece in whole)
    assert len({tuple(piece) for piece in whole}) == len(whole)
    assert not last or any(document[: len(last)] == last for document in originals)
    assert total - len(rest) < length


def test_the_order_follows_the_seed() -> None:
    documents = numbered(*[10] * 40)
    packs = [pack(documents, tokenizer(), sequence_length=11, seed=seed) for seed in (0, 0, 1)]
    assert items_equal(packs[0], packs[1])
    assert packs[0].fingerprint == packs[1].fingerprint != packs[2].fingerprint
    assert stream(packs[0]) != stream(packs[2])
    assert sorted(stream(packs[0])) == sorted(stream(packs[2]))
    in_order = [token for document in ids(documents) for token in [*document, EOS]]
    assert in_order not in (stream(packs[0]), stream(packs[2]))


def test_the_fingerprint_tells_what_the_items_tell() -> None:
    tokens = torch.arange(24, dtype=torch.int32)
    starts = torch.tensor([0, 5, 20])
    base = PackedDataset(tokens, starts, 8)
    changed = tokens.clone()
    changed[23] += 1
    others = [
        PackedDataset(changed, starts, 8),
        PackedDataset(tokens, torch.tensor([0, 6, 20]), 8),
        PackedDataset(tokens, starts, 12),
        PackedDataset(tokens[:16], starts[:2], 8),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 5
    assert PackedDataset(tokens.clone(), starts.clone(), 8).fingerprint == base.fingerprint


def test_workers_do_not_change_the_items() -> None:
    packed = pack(numbered(*[30] * 20), tokenizer(), sequence_length=16, seed=3)
    loader = torch.utils.data.DataLoader(packed, batch_size=5, num_workers=2)
    batches = list(loader)
    for key in ("input_ids", "position_ids"):
        assert torch.equal(torch.cat([batch[key] for batch in batches]), torch.stack([item[key] for item in packed]))


def test_a_bounded_pack_is_the_beginning_of_the_whole_and_stops_tokenising() -> None:
    documents = numbered(*[9] * 500)
    whole_tokenizer, bounded_tokenizer = tokenizer(), tokenizer()
    whole = pack(documents, whole_tokenizer, sequence_length=8, seed=5)
    bounded = pack(documents, bounded_tokenizer, sequence_length=8, seed=5, max_sequences=3)
    assert whole_tokenizer.texts == 500
    assert bounded_tokenizer.texts < 100
    assert len(bounded) == 3
    assert stream(bounded) == stream(whole)[:24]
    assert all(torch.equal(bounded[n]["position_ids"], whole[n]["position_ids"]) for n in range(3))


def test_documents_that_begin_in_the_dropped_rest_leave_no_trace() -> None:
    packed = pack(numbered(*[1] * 7), tokenizer(), sequence_length=4, seed=0, max_sequences=50)
    assert len(packed) == 3, "more sequences wanted than there are is no error"
    assert packed.document_starts.tolist() == [0, 2, 4, 6, 8, 10]
    assert packed.tokens.untyped_storage().nbytes() == 12 * 4


def test_a_very_long_document_is_tokenised_in_pieces_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = numbered(3, 2000, 40)
    whole = pack(documents, tokenizer(), sequence_length=32, seed=0)
    monkeypatch.setattr(data, "CHARACTERS_PER_CALL", 99)
    counting = tokenizer()
    assert pack(documents, counting, sequence_length=32, seed=0).fingerprint == whole.fingerprint
    assert counting.texts > 50
    bounded = tokenizer()
    pack(documents, bounded, sequence_length=32, seed=0, max_sequences=4)
    assert bounded.characters < counting.characters / 4


@pytest.mark.parametrize("line", ["", "\n", "abc\n"])
def test_pieces_join_to_the_text(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(data, "CHARACTERS_PER_CALL", 10)
    text = line * 9 + "x" * 37 + line * 5
    pieces = list(data._pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 10 for piece in pieces)


def test_short_documents_can_be_skipped() -> None:
    documents = numbered(5, 19, 20, 3, 40)
    packed = pack(documents, tokenizer(), sequence_length=7, seed=0, min_document_tokens=20)
    assert len(packed) == (20 + 21 + 41) // 7
    kept = {token for document in ids(documents) if len(document) >= 19 for token in document}
    assert set(stream(packed)) <= kept | {EOS}


def test_a_bound_below_the_minimum_does_not_skip_long_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHARACTERS_PER_CALL", 50)
    packed = pack(numbered(300), tokenizer(), sequence_length=8, seed=0, max_sequences=1, min_document_tokens=200)
    assert len(packed) == 1


@pytest.mark.parametrize("max_sequences", [None, 3])
def test_one_document_per_sequence(max_sequences: int | None) -> None:
    documents = numbered(5, 29, 30, 64, 8)
    packed = pack(documents, tokenizer(), sequence_length=10, seed=0, max_sequences=max_sequences, one_document=True)
    assert len(packed) == (max_sequences or 3 + 3 + 6)
    originals = [[*document, EOS] for document in ids(documents)]
    for item in packed:
        assert torch.equal(item["position_ids"], torch.arange(10))
        tokens = item["input_ids"].tolist()
        assert any(tokens == original[at : at + 10] for original in originals for at in range(0, len(original), 10))


def test_without_an_eos_token_the_bos_token_separates() -> None:
    documents = numbered(4, 4)
    packed = pack(documents, tokenizer(bos_token="<bos>"), sequence_length=5, seed=0)
    assert sorted(item["input_ids"].tolist() for item in packed) == [[BOS, *document] for document in ids(documents)]
    assert all(torch.equal(item["position_ids"], torch.arange(5)) for item in packed)


def test_a_tokenizer_without_separators_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer must have an eos or a bos token"):
        pack(numbered(4), tokenizer(unk_token="?"), sequence_length=2, seed=0)


def test_empty_and_missing_texts_are_skipped() -> None:
    full = numbered(6, 6)
    holes = datasets.Dataset.from_dict({"text": [None, full["text"][0], "", " \n", full["text"][1]]})
    packed = pack(holes, tokenizer(), sequence_length=7, seed=0)
    assert sorted(item["input_ids"].tolist() for item in packed) == [[*document, EOS] for document in ids(full)]


def test_too_little_text_says_how_much() -> None:
    with pytest.raises(
        ValueError, match=r"needs sequence_length=64 tokens, got 12 \(of 12 read, the longest document 8"
    ):
        pack(numbered(3, 7), tokenizer(), sequence_length=64, seed=0)
    with pytest.raises(ValueError, match=r"sequence_length=8 tokens, got 0 \(of 12 read, .*min_document_tokens=9"):
        pack(numbered(3, 7), tokenizer(), sequence_length=8, seed=0, min_document_tokens=9)
    with pytest.raises(ValueError, match=r"got 0 .*one_document=True"):
        pack(numbered(3, 6), tokenizer(), sequence_length=8, seed=0, one_document=True)


@pytest.mark.parametrize(
    ("name", "value", "least"), [("sequence_length", 0, 1), ("max_sequences", 0, 1), ("min_document_tokens", -1, 0)]
)
def test_arguments_out_of_range_are_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"pack: {name} must be at least {least}, got {value}"):
        pack(numbered(9), tokenizer(), **{"sequence_length": 4, "seed": 0, name: value})


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    packed = pack(numbered(9), tokenizer(), sequence_length=5, seed=0)
    with pytest.raises(IndexError, match=rf"index must be in 0..1, got {index}"):
        packed[index]


def test_the_summary_says_what_the_sequences_hold() -> None:
    documents = datasets.Dataset.from_dict({"text": [*numbered(9, 3, 8)["text"], None, "", " \n"]})
    packed = pack(documents, tokenizer(), sequence_length=11, seed=0)
    found = packed.summary(7)
    assert (found.documents, found.sequences, found.tokens, found.sequence_length) == (3, 2, 22, 11)
    assert (found.dropped_tokens, found.empty_documents, found.is_whole_text) == (1, 3, True)
    assert found.epochs == 3.5
    assert describe(found).splitlines() == [
        "text: 3 documents, 22 tokens in 2 sequences of 11; 3.50 epochs; 3 empty documents skipped; "
        "1 token left over, in no sequence",
        "the text repeats: the steps draw 7 sequences, 3.5 times what there is; give more text or fewer steps",
    ]


def test_a_text_that_is_long_enough_does_not_repeat() -> None:
    packed = pack(numbered(*[20] * 5), tokenizer(), sequence_length=8, seed=0, max_sequences=3)
    found = packed.summary(3)
    assert (found.sequences, found.dropped_tokens, found.is_whole_text, found.epochs) == (3, 0, False, 1.0)
    assert describe(found) == (
        "text: 2 documents, 24 tokens in 3 sequences of 8; 1.00 epochs; text beyond what the steps need is not read"
    )


def test_remainders_and_short_documents_count_as_dropped() -> None:
    documents = numbered(5, 29, 30, 8)
    cut = pack(documents, tokenizer(), sequence_length=10, seed=0, one_document=True).summary(6)
    assert (cut.documents, cut.sequences, cut.dropped_tokens) == (2, 6, 6 + 0 + 1 + 9)
    skipped = pack(documents, tokenizer(), sequence_length=10, seed=0, min_document_tokens=20).summary(6)
    assert (skipped.documents, skipped.tokens, skipped.dropped_tokens) == (2, 60, 1 + 6 + 9)


def test_a_summary_of_no_sequences_is_refused() -> None:
    with pytest.raises(ValueError, match="sequences_needed must be at least 1, got 0"):
        pack(numbered(9), tokenizer(), sequence_length=5, seed=0).summary(0)


def test_token_ids_beyond_the_embedding_are_refused() -> None:
    largest = 2 + 8
    assert pack(numbered(9), tokenizer(), sequence_length=5, seed=0, vocab_size=largest + 1).largest_token_id == largest
    with pytest.raises(ValueError, match=r"ids must be below the model's vocab_size = 10, got 10; use the tokenizer"):
        pack(numbered(9), tokenizer(), sequence_length=5, seed=0, vocab_size=largest)


def test_sequences_longer_than_the_models_context_are_told() -> None:
    assert length_warning(256, 256) is None and length_warning(2**20, None) is None
    told = length_warning(257, 256)
    assert told is not None
    assert "sequence_length = 257 is above the model's max_position_embeddings = 256" in told
