"""What a sparse run begins with must be what was warmed up: the tokenizer and the vocabulary too."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from flash_indexer.cli import app
from flash_indexer.files.native import read_native, save_native
from flash_indexer.models.attach import attach
from flash_indexer.models.load import load_model, model_fingerprint, tokenizer_fingerprint
from flash_indexer.recipe.sparse import train_sparsely
from flash_indexer.recipe.sparse_record import SparseRunSettings
from flash_indexer.recipe.warmup import warm_up

RECORDS = ("tokenizer_fingerprint", "base_tokenizer_fingerprint", "base_vocab_size")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=500)


def permute(folder: Path) -> Path:
    """Gives the checkpoint in `folder` the same words under other ids."""
    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    words = Tokenizer(WordLevel({word: (n + 7) % len(vocabulary) for word, n in vocabulary.items()}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(folder)
    return folder


def forget(folder: Path) -> Path:
    """Makes a run in `folder`, or an export, one of before there were these records."""
    for file in [*folder.rglob("run.json"), *folder.rglob("indexer_config.json")]:
        record = json.loads(file.read_text())
        file.write_text(json.dumps({name: value for name, value in record.items() if name not in RECORDS}))
    return folder


@pytest.fixture
def permuted(tmp_path: Path, checkpoint: Path) -> Path:
    """The tiny Llama, the same weights, with a tokenizer whose ids are others."""
    return permute(Path(shutil.copytree(checkpoint, tmp_path / "permuted")))


@pytest.fixture
def sparsely(warm: Path, texts: Path) -> Callable[..., Any]:
    def train(out: Path, *, resume: bool = False, **changes: Any) -> Any:
        values = dict(init_from=str(warm), data=str(texts), topk=8, sequence_length=32, steps=1, save_every=1)
        return train_sparsely(SparseRunSettings(**(values | changes)), out, resume=resume, console=quiet())

    return train


def test_another_tokenizer_is_refused_before_anything_trains(
    tmp_path: Path, warm: Path, permuted: Path, checkpoint: Path, sparsely: Callable[..., Any]
) -> None:
    native = tmp_path / "native"
    said = CliRunner().invoke(app, ["export", "--run", str(warm), str(native), "--format", "native"])
    assert said.exit_code == 0, said.output
    for source in (warm, native):
        with pytest.raises(
            ValueError, match=f"sparse: the tokenizer of {permuted} must be the one that the indexers were trained with"
        ):
            sparsely(tmp_path / "run", init_from=str(source), model=str(permuted))
    assert not (tmp_path / "run").exists()
    sparsely(tmp_path / "run", init_from=str(native), model=str(checkpoint))


@pytest.mark.parametrize("command", [["evaluate"], ["check"], ["export", "--format", "native"]])
def test_nor_is_it_judged_or_exported(tmp_path: Path, warm: Path, permuted: Path, command: list[str]) -> None:
    more = [str(tmp_path / "exported")] if command[0] == "export" else []
    said = CliRunner().invoke(app, [*command, "--run", str(warm), "--model", str(permuted), *more])
    assert said.exit_code == 1 and f"{command[0]}: the tokenizer of {permuted} must be" in said.output.replace("\n", "")
    assert not (tmp_path / "exported").exists()


def test_runs_and_exports_record_their_tokenizer(
    tmp_path: Path, warm: Path, checkpoint: Path, permuted: Path, sparsely: Callable[..., Any]
) -> None:
    sparsely(tmp_path / "run")
    one, other = (tokenizer_fingerprint(AutoTokenizer.from_pretrained(path)) for path in (checkpoint, permuted))
    assert one != other and len(one) == 64
    said = CliRunner().invoke(app, ["export", "--run", str(tmp_path / "run"), str(tmp_path / "out"), "--format=native"])
    assert said.exit_code == 0, said.output
    for run in (warm, tmp_path / "run"):
        assert json.loads((run / "run.json").read_text())["tokenizer_fingerprint"] == one
    for folder in (warm / "checkpoint", tmp_path / "run" / "checkpoint", tmp_path / "out"):
        config = read_native(folder).config
        assert (config.base_tokenizer_fingerprint, config.base_vocab_size) == (one, 61)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "out" / "model")) == one


def test_runs_of_before_it_was_recorded_go_on(
    tmp_path: Path, warm: Path, permuted: Path, sparsely: Callable[..., Any], tiny_settings: Callable[..., Any]
) -> None:
    """With any tokenizer where nothing says which it was; a checkpoint that is written then says it."""
    old = forget(Path(shutil.copytree(warm, tmp_path / "old")))
    assert read_native(old / "checkpoint").config.base_vocab_size is None
    sparsely(tmp_path / "run", init_from=str(old), model=str(permuted))
    sparsely(tmp_path / "run", resume=True, init_from=str(old))
    sparsely(forget(tmp_path / "run"), resume=True)
    warm_up(tiny_settings(), old, resume=True, steps=13, console=quiet())
    assert read_native(old / "checkpoint").config.base_tokenizer_fingerprint is not None


def test_a_run_does_not_go_on_with_another_tokenizer(
    tmp_path: Path, checkpoint: Path, sparsely: Callable[..., Any], tiny_settings: Callable[..., Any]
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    warm_up(tiny_settings(model=str(model), steps=1), tmp_path / "warm", console=quiet())
    sparsely(tmp_path / "run", init_from=str(tmp_path / "warm"))
    permute(model)
    with pytest.raises(
        ValueError, match=r"warmup: tokenizer_fingerprint must be .* with the same model, tokenizer and"
    ):
        warm_up(tiny_settings(model=str(model)), tmp_path / "warm", resume=True, steps=2, console=quiet())
    with pytest.raises(ValueError, match=f"sparse: the tokenizer of {model} must be the one"):
        sparsely(tmp_path / "run", resume=True)
    forget(tmp_path / "warm")
    with pytest.raises(ValueError, match=r"sparse: tokenizer_fingerprint must be .* with the same model, tokenizer, i"):
        sparsely(tmp_path / "run", resume=True)


def test_another_vocabulary_is_refused_with_both_sizes(
    tmp_path: Path, warm: Path, checkpoint: Path, sparsely: Callable[..., Any]
) -> None:
    model, tokenizer = load_model(checkpoint, dtype=torch.float32)
    model.resize_token_embeddings(77, mean_resizing=False)
    model.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    sizes = r"trained on a model with a vocabulary of 61 tokens \(vocab_size\), this one has 77; load '"
    with pytest.raises(ValueError, match=f"sparse: --init-from must hold indexers of the model .*large: .*{sizes}"):
        sparsely(tmp_path / "run", model=str(tmp_path / "large"))
    old = forget(Path(shutil.copytree(warm, tmp_path / "old")))
    with pytest.raises(ValueError, match="another base model: fingerprint"):
        sparsely(tmp_path / "run", init_from=str(old), model=str(tmp_path / "large"))
    assert not (tmp_path / "run").exists()


def test_a_python_loop_may_record_its_tokenizer(
    tmp_path: Path, checkpoint: Path, permuted: Path, sparsely: Any
) -> None:
    model, tokenizer = load_model(checkpoint, dtype=torch.float32)
    fingerprint, handle = model_fingerprint(model), attach(model, num_heads=4, head_dim=32)
    handle.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
    native = save_native(handle, tmp_path / "native", base_name=str(checkpoint), base_fingerprint=fingerprint)
    with pytest.raises(ValueError, match="sparse: the tokenizer of"):
        sparsely(tmp_path / "run", init_from=str(native), model=str(permuted))
