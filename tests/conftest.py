"""A tiny checkpoint with its tokenizer, and texts for it; processes that stay and are asked over pipes."""

from __future__ import annotations

import multiprocessing
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = 60
RANK = """
import runpy
runpy.run_path(programs)["serve"](rank, world, port, backend, seconds, pipe)
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers, 6 heads over 2 key heads, whose attention is far from uniform. Read only."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 1, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=WORDS,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in sorted(model.state_dict().items()):
        if "norm" not in name:
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(WORDS)} | {"<eos>": WORDS}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 documents of 20 to 120 words. Read only."""
    path = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for n in range(40):
        words = [f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(20, 120))]
        (path / f"{n:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return path


class Ranks:
    """Processes, forked from a server that has imported torch, which run functions of distributed/programs.py.

    One that does not answer within `seconds` is taken to hang: all are killed and the test fails.
    """

    def __init__(self, backend: str, world: int, seconds: int) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["flash_indexer.testing", "flash_indexer.distributed"])
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.seconds, self.pipes, self.processes = seconds, [], []
        common = dict(
            programs=str(Path(__file__).with_name("distributed") / "programs.py"), world=world, port=port,
            backend=backend, seconds=seconds,
        )  # fmt: skip
        for rank in range(world):
            ours, theirs = server.Pipe()
            names = dict(common, rank=rank, pipe=theirs)
            self.pipes.append(ours)
            self.processes.append(server.Process(target=exec, args=(RANK, names), daemon=True))
            self.processes[-1].start()

    def call(self, program: str, world: int, **arguments: Any) -> list[Any]:
        """What the first `world` ranks return, in order."""
        for pipe in self.pipes[:world]:
            pipe.send((program, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes[:world]):
            if not pipe.poll(self.seconds):
                self.end()
                pytest.fail(f"{program}: rank {rank} of {world} did not answer in {self.seconds} s")
            answers.append(pipe.recv())
        for rank, (good, value) in enumerate(answers):
            assert good, f"rank {rank}: {value}"
        return [value for _, value in answers]

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            process.kill()


@pytest.fixture(scope="session")
def start_ranks() -> Iterator[Callable[..., Ranks]]:
    """start_ranks(backend, world, seconds=...): they are ended with the session."""
    started: list[Ranks] = []

    def start(backend: str, world: int, *, seconds: int) -> Ranks:
        started.append(Ranks(backend, world, seconds))
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()


@pytest.fixture(scope="session")
def pair(start_ranks: Callable[..., Ranks]) -> Ranks:
    """Two processes joined by gloo."""
    return start_ranks("gloo", 2, seconds=60)
