"""Tiny checkpoints, texts for them, and processes: runs of the recipe, and ranks that are asked over pipes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from flash_indexer.recipe.run_record import WarmupSettings

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, whose tests press Ctrl-C as well
    signal.signal(signal.SIGINT, signal.default_int_handler)
# As many test processes run side by side as there are cores: torch, which is imported later, has one thread in them
# and in those that they start. Nothing heavy is imported here: the process that deals tests out, for which all others
# wait, reads this file too.
os.environ["OMP_NUM_THREADS"] = "1"
HANG = 240  # seconds after which a process is taken to hang
GPU_TESTS = Path(__file__).with_name("gpu")
WORDS = 60
SIZES: dict[str, Any] = dict(
    vocab_size=WORDS + 1, hidden_size=48, intermediate_size=64, num_hidden_layers=3, max_position_embeddings=256,
    bos_token_id=None, eos_token_id=WORDS,
)  # fmt: skip
ONE_THREAD = """
import torch
torch.set_num_threads(1)
"""
RUN = """
import io, os
from rich.console import Console
os.environ.update(environment)
from flash_indexer.recipe.processes import ParallelSettings
from flash_indexer.recipe.run_record import WarmupSettings
from flash_indexer.recipe.warmup import warm_up
console = Console(file=io.StringIO())
warm_up(WarmupSettings(**settings), out, resume=resume, console=console, parallel=ParallelSettings(**parallel))
"""
RANK = """
import runpy
runpy.run_path(programs)["serve"](rank, world, port, backend, seconds, pipe)
"""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where there is no GPU, its thousands of tests are left out, unless their path or a list of tests is asked for."""
    if collection_path != GPU_TESTS or config.option.collectonly:
        return None
    import torch

    if torch.cuda.is_available():
        return None
    paths = [Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(GPU_TESTS) for path in paths) else True


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Millions of objects of imported modules stay: no search for garbage among them, while they come or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def write_checkpoint(path: Path, config: Any) -> Path:
    """A model whose attention is far from uniform, with a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in sorted(model.state_dict().items()):
        if "norm" not in name:
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(WORDS)} | {"<eos>": WORDS}, unk_token="<eos>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(path)
    return path


def fork_server() -> Any:
    """The one server that new processes are forked from, within milliseconds; it has imported preload.py."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["preload"])
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:  # of sys.path the server knows nothing
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
        ensure_running()
    return server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 3 layers, 6 heads over 2 key heads. Read only."""
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2)
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", config)


@pytest.fixture(scope="session")
def mla_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 of 3 layers, 4 heads, the last layer of experts. Read only."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, first_k_dense_replace=2, moe_intermediate_size=32, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "mla", config)


@pytest.fixture(scope="session")
def own_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-MoE-DSA of 3 layers, 4 heads, the second of which uses the first's indexer: 4 heads of 32. Read only."""
    from transformers import GlmMoeDsaConfig

    config = GlmMoeDsaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, first_k_dense_replace=2, moe_intermediate_size=32, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, index_n_heads=4, index_head_dim=32,
        index_topk=8, indexer_types=["full", "shared", "full"],
    )  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "own", config)


@pytest.fixture(scope="session")
def window_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral of 3 layers, 4 heads over 2 key heads, whose queries see 9 keys. Read only."""
    from transformers import MistralConfig

    config = MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=9)
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "window", config)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 documents of 20 to 120 words. Read only."""
    path = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for n in range(40):
        words = [f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(20, 120))]
        (path / f"{n:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture
def blank_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are made, and their files are there, but nobody paints them: for tests that look at what is beside them."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: Path(path).touch())


class Ports:
    """`take()` gives a port of this machine that no other program is given before the tests end.

    A socket that is bound to it and does not listen keeps it: neither a program that asks for any free port nor a
    connection gets it then, while a server that allows the reuse of addresses, as that of torch's store does, listens
    at it. A port that is found and let go may be another's before the server listens.
    """

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []

    def take(self) -> int:
        held = socket.socket()
        self.sockets.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("", 0))
        return int(held.getsockname()[1])

    def places(self, count: int) -> list[dict[str, str]]:
        """What torchrun tells each of `count` processes in its environment: its rank, and where all meet."""
        sizes = dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        place = sizes | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.take()))
        return [place | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]

    def release(self) -> None:
        for held in self.sockets:
            held.close()


@pytest.fixture(scope="session")
def ports() -> Iterator[Ports]:
    ports = Ports()
    yield ports
    ports.release()


class Runs:
    """Warm-up runs in new processes."""

    def __init__(self, ports: Ports) -> None:
        self.context, self.ports = fork_server(), ports
        self.start("", None, Path()).join()

    def start(self, code: str, settings: WarmupSettings | None, out: Path, **names: Any) -> BaseProcess:
        """`code`, then `warm_up(settings, out)`; other names are variables of both. Without settings the code alone."""
        names = dict(out=str(out), resume=True, parallel={}, environment={}) | names
        if settings is not None:
            names, code = names | dict(settings=asdict(settings)), code + RUN
        process: BaseProcess = self.context.Process(target=exec, args=(ONE_THREAD + code, names))
        process.start()
        return process

    def ranks(
        self, count: int, settings: WarmupSettings | None, out: Path, *, codes: Sequence[str] = (), **names: Any
    ) -> list[BaseProcess]:
        """One run of `count` processes in torchrun's environment; codes[rank], if there, comes before its run."""
        started = []
        for rank, place in enumerate(self.ports.places(count)):
            code, environment = codes[rank] if rank < len(codes) else "", place | dict(ACCELERATE_USE_CPU="true")
            started.append(self.start(code, settings, out, environment=environment, **names))
        return started

    @staticmethod
    def finish(processes: Sequence[BaseProcess], exitcode: int = 0) -> None:
        """Waits for all of them, and requires that each ends so. One that hangs is left to the limit on the test."""
        try:
            for process in processes:
                process.join()
        except BaseException:
            for process in processes:
                process.kill()
            raise
        assert [process.exitcode for process in processes] == [exitcode] * len(processes)


@pytest.fixture(scope="session")
def runs(ports: Ports) -> Runs:
    return Runs(ports)


@pytest.fixture(scope="session")
def tiny_settings(checkpoint: Path, texts: Path) -> Callable[..., WarmupSettings]:
    """`tiny_settings(**changes)`: a run of 12 steps on the tiny Llama."""
    from flash_indexer.recipe.run_record import WarmupSettings

    def build(**changes: Any) -> WarmupSettings:
        values = dict(
            model=str(checkpoint), data=str(texts), sequence_length=32, steps=12, warmup_steps=3, num_heads=4,
            head_dim=32, rope_dim=16, save_every=4,
        )  # fmt: skip
        return WarmupSettings(**(values | changes))

    return build


class Ranks:
    """Processes, forked from a server that has imported torch, which run functions of parallel/programs.py.

    One that does not answer within HANG seconds is taken to hang: all are killed and the test fails.
    """

    def __init__(self, backend: str, world: int, port: int) -> None:
        server = fork_server()
        self.pipes, self.processes = [], []
        common = dict(
            programs=str(Path(__file__).with_name("parallel") / "programs.py"), world=world, port=port,
            backend=backend, seconds=HANG,
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
            if not pipe.poll(HANG):
                self.end()
                pytest.fail(f"{program}: rank {rank} of {world} did not answer in {HANG} s")
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
def start_ranks(ports: Ports) -> Iterator[Callable[..., Ranks]]:
    """start_ranks(backend, world): they are ended with the session."""
    started: list[Ranks] = []

    def start(backend: str, world: int) -> Ranks:
        started.append(Ranks(backend, world, ports.take()))
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()


@pytest.fixture(scope="session")
def pair(start_ranks: Callable[..., Ranks]) -> Ranks:
    """Two processes joined by gloo."""
    return start_ranks("gloo", 2)
