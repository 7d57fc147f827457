"""`--queries`: a run on a part of the queries learns, is resumed bit for bit, and is the same on many processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments

from flash_indexer.models.attach import IndexerHandle, attach
from flash_indexer.models.load import load_model
from flash_indexer.parallel import context_positions
from flash_indexer.parallel.mesh import Parallel
from flash_indexer.recipe import loop, warmup
from flash_indexer.recipe.data import load_documents, pack
from flash_indexer.recipe.processes import Processes
from flash_indexer.recipe.queries import block_tokens, draw_queries
from flash_indexer.recipe.run_record import read_metrics, warmup_command
from flash_indexer.recipe.trainer import IndexerTrainer

L = 32


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor | None, float | None]]:
    """What each forward of a run was told: the queries, and the weight of one."""
    told: list[tuple[Tensor | None, float | None]] = []
    original = loop.forward

    def forward(handle: IndexerHandle, batch: dict[str, Tensor]) -> None:
        told.append((handle.queries, handle.token_weight))
        original(handle, batch)

    monkeypatch.setattr(loop, "forward", forward)
    return told


def test_each_sequence_of_each_step_has_a_draw_of_its_own(
    tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = watch(monkeypatch)
    handle = recipe(tmp_path / "run", steps=3, batch_size=2, accumulation=2, queries=0.25, seed=5)
    assert handle.queries is None, "whoever goes on with the handle has other batches"
    assert len(told) == 6
    for n, (queries, weight) in enumerate(told):
        draws = [draw_queries(L, 0.25, seed=5, draw=str(2 * n + i)) + i * L for i in range(2)]
        assert queries is not None and torch.equal(queries, torch.cat(draws))
        assert weight == pytest.approx(1 / (4 * L * 0.25))
    assert len({tuple(queries.tolist()) for queries, _ in told if queries is not None}) == 6


def test_all_queries_are_none_of_them_drawn(tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = watch(monkeypatch)
    recipe(tmp_path / "run", steps=1)
    assert told == [(None, 1 / L)]


def test_the_first_steps_metrics_are_the_drawn_queries(tmp_path: Path, recipe: Any) -> None:
    """Means over the drawn queries of fresh indexers, near the means over all."""
    recipe(tmp_path / "all", steps=1, batch_size=8)
    recipe(tmp_path / "some", steps=1, batch_size=8, queries=0.5)
    (whole,), (some,) = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("all", "some"))
    assert some["tokens"] == whole["tokens"] == 8 * L
    assert some["kl"] != whole["kl"] and some["kl"] == pytest.approx(whole["kl"], rel=0.2)
    assert some["kl_over_uniform"] == pytest.approx(whole["kl_over_uniform"], rel=0.01)


def test_the_logged_loss_is_over_the_expected_number_of_queries(
    tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the gradients are: over the number drawn it would be biased. 0.3 of a sequence is no whole number of them."""
    original, sums = loop.forward, list[tuple[int, float]]()

    def forward(handle: IndexerHandle, batch: dict[str, Tensor]) -> None:
        original(handle, batch)
        assert handle.queries is not None
        mean = torch.stack([loss.kl for loss in handle.losses().values()]).mean()
        sums.append((len(handle.queries), float(mean) * len(handle.queries)))

    monkeypatch.setattr(loop, "forward", forward)
    recipe(tmp_path / "run", queries=0.3, batch_size=1, steps=8)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len({drawn for drawn, _ in sums}) > 1
    for row, (_, total) in zip(rows, sums, strict=True):
        assert row["loss"] == pytest.approx(total / (0.3 * L), rel=1e-5)


@pytest.mark.slow
def test_a_quarter_of_the_queries_learns(tmp_path: Path, recipe: Any) -> None:
    recipe(tmp_path / "run", steps=80, lr=1e-2, batch_size=4, num_heads=8, head_dim=64, save_every=80, queries=0.25)
    found = [row["kl_over_uniform"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(found[-10:]) / 10 < 0.85 < 0.95 < sum(found[:5]) / 5


def test_an_interrupted_run_goes_on_bit_for_bit(
    tmp_path: Path, recipe: Any, same_bits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe(tmp_path / "whole", queries=0.3, batch_size=2)
    original, calls = loop.forward, iter(range(99))

    def dies(handle: IndexerHandle, batch: dict[str, Tensor]) -> None:
        if next(calls) == 9:  # the first forward is the short sequence that is tried
            raise KeyboardInterrupt
        original(handle, batch)

    monkeypatch.setattr(loop, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        recipe(tmp_path / "cut", queries=0.3, batch_size=2)
    monkeypatch.undo()
    assert 8 <= len(read_metrics(tmp_path / "cut" / "metrics.jsonl")) < 12
    recipe(tmp_path / "cut", resume=True, queries=0.9)  # the settings are the recorded ones
    same_bits(tmp_path / "whole", tmp_path / "cut")


def test_mass_is_that_of_drawn_queries_near_the_end(tmp_path: Path, recipe: Any) -> None:
    long = tmp_path / "long.txt"
    long.write_text(" ".join(f"w{n * n % 59}" for n in range(700)))
    masses = []
    for queries in (1.0, 0.25):
        out = tmp_path / str(queries)
        recipe(out, data=str(long), sequence_length=640, steps=1, queries=queries)
        masses.append(read_metrics(out / "metrics.jsonl")[0]["mass"])
    assert 0 < masses[1] < 1 and masses[1] == pytest.approx(masses[0], rel=0.1) and masses[0] != masses[1]


def test_the_time_budget_counts_steps_on_the_drawn_queries(
    tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int | None] = []
    original = warmup.forward

    def forward(handle: IndexerHandle, batch: dict[str, Tensor]) -> None:
        tried.append(None if handle.queries is None else len(handle.queries))
        original(handle, batch)

    monkeypatch.setattr(warmup, "forward", forward)
    recipe(tmp_path / "run", steps=None, minutes=1e-4, queries=0.25)
    assert tried == [None, L // 4, L // 4]


def test_the_record_names_the_fraction(tmp_path: Path, recipe: Any) -> None:
    recipe(tmp_path / "run", steps=1, queries=0.25)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["queries"] == 0.25
    assert "--queries 0.25" in warmup_command(record["settings"], "out")


SHARED: dict[str, Any] = dict(sequence_length=64, steps=6, save_every=6, rope_dim=None, queries=0.5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, runs: Any, tiny_settings: Any) -> Path:
    """The run of one process. Read only."""
    out = tmp_path_factory.mktemp("alone") / "run"
    runs.finish([runs.start("", tiny_settings(**SHARED, batch_size=2), out)])
    return out


@pytest.mark.parametrize(
    ("count", "parallel"),
    [
        (2, dict(cp=2)),
        pytest.param(2, dict(tp=2), marks=pytest.mark.slow),
        (2, dict()),
        pytest.param(4, dict(cp=2, tp=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_many_processes_train_what_one_does(
    tmp_path: Path, runs: Any, tiny_settings: Any, alone: Path, count: int, parallel: dict[str, int]
) -> None:
    """The same queries are drawn of the same sequences, whoever holds them."""
    dp, many = count // (parallel.get("cp", 1) * parallel.get("tp", 1)), tmp_path / "many"
    runs.finish(runs.ranks(count, tiny_settings(**SHARED, batch_size=2 // dp), many, parallel=parallel))
    mine, theirs = (read_metrics(out / "metrics.jsonl") for out in (alone, many))
    assert len(mine) == len(theirs) == 6
    for row, same in zip(mine, theirs, strict=True):
        assert row["kl"] == pytest.approx(same["kl"], rel=2e-4)
        assert row["uniform_kl"] == pytest.approx(same["uniform_kl"], rel=1e-5)
    first, second = (load_file(out / "checkpoint" / "indexer.safetensors") for out in (alone, many))
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 5e-2 * tensor.norm(), name


def shares(tokens: Tensor, length: int, cp: int, layout: str) -> list[Tensor]:
    """The drawn tokens of each of `cp` processes, counted in the whole sequence."""
    found = []
    for rank in range(cp):
        processes = Processes.__new__(Processes)
        processes.parallel = Parallel(cp=cp, cp_rank=rank, layout=layout)
        found.append(context_positions(length, cp, rank, layout=layout)[processes.own_tokens(tokens, length)])
    assert torch.equal(torch.cat(found).sort().values, tokens)
    return found


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("length", "cp", "fraction"),
    [(131072, 8, 1 / 2), (131072, 8, 1 / 4), (131072, 8, 1 / 8), (131072, 8, 1 / 16),
     (32768, 8, 1 / 8), (32768, 8, 1 / 16), (8192, 8, 1 / 4), (8192, 4, 1 / 8), (8192, 2, 1 / 16), (2048, 2, 1 / 16)],
)  # fmt: skip
def test_processes_that_share_a_sequence_get_equal_shares_where_each_piece_holds_whole_runs(
    layout: str, length: int, cp: int, fraction: float
) -> None:
    """With zigzag they see as many pairs, too, but for where each of the m blocks lies in its run: an m-th at most."""
    blocks = int(length * fraction) // block_tokens(length, fraction)
    assert blocks % (2 * cp) == 0
    pairs = fraction * length * (length + 1) / 2 / cp
    for draw in range(5):
        found = shares(draw_queries(length, fraction, seed=1, draw=str(draw)), length, cp, layout)
        assert {len(own) for own in found} == {length * fraction / cp}
        if layout == "zigzag":
            assert all(abs(int((own + 1).sum()) - pairs) < pairs / blocks for own in found)


@pytest.mark.parametrize(("layout", "pieces"), [("zigzag", 2), ("contiguous", 1)])
@pytest.mark.parametrize(
    ("length", "cp", "fraction"),
    [(8192, 8, 1 / 8), (8192, 8, 1 / 16), (8192, 2, 0.1), (32768, 4, 0.1), (32768, 8, 0.1), (32768, 4, 0.3),
     (131072, 8, 0.1), (4096, 8, 1 / 16)],
)  # fmt: skip
def test_elsewhere_each_piece_of_a_sequence_has_its_share_but_for_two_blocks(
    layout: str, pieces: int, length: int, cp: int, fraction: float
) -> None:
    for draw in range(20):
        tokens = draw_queries(length, fraction, seed=1, draw=str(draw))
        found = shares(tokens, length, cp, layout)
        furthest = max(abs(len(own) - len(tokens) / cp) for own in found)
        assert furthest < 2 * pieces * block_tokens(length, fraction)


def test_fewer_blocks_than_pieces_leave_a_process_without_queries() -> None:
    """8 blocks for the 16 pieces of 8 processes, where 4 have 2 blocks each."""
    draws = [draw_queries(8192, 1 / 8, seed=1, draw=str(draw)) for draw in range(5)]
    for cp, fewest in ((4, 256), (8, 0)):
        assert min(len(own) for tokens in draws for own in shares(tokens, 8192, cp, "zigzag")) == fewest


OPTIONS: dict[str, Any] = dict(
    max_steps=4, learning_rate=1e-3, adam_epsilon=1e-12, max_grad_norm=0.05, lr_scheduler_type="constant",
    train_sampling_strategy="sequential", logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, seed=3,
    save_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
)  # fmt: skip


class Drawn:
    """An `IndexerTrainer` on the tiny Llama with a quarter of the queries, and what its forwards were told."""

    def __init__(self, folder: Path, checkpoint: Path, texts: Path) -> None:
        model, tokenizer = load_model(checkpoint, dtype=torch.float32)
        torch.manual_seed(0)
        self.handle = attach(model, num_heads=2, head_dim=32)
        data = pack(load_documents(texts), tokenizer, sequence_length=L, seed=0)
        self.told: list[tuple[Any, float | None]] = []
        self.trainer = IndexerTrainer(
            self.handle, queries=0.25, args=TrainingArguments(str(folder), **OPTIONS), train_dataset=data,
            eval_dataset=data,
        )  # fmt: skip
        self.handle.decoder.register_forward_pre_hook(self.look)

    def look(self, module: Any, arguments: Any) -> None:
        queries = self.handle.queries
        self.told.append((None if queries is None else tuple(queries.tolist()), self.handle.token_weight))


def test_the_trainer_draws_anew_for_every_batch_and_goes_on_bit_for_bit(
    tmp_path: Path, checkpoint: Path, texts: Path
) -> None:
    whole = Drawn(tmp_path / "run", checkpoint, texts)
    whole.trainer.train()
    assert len({queries for queries, _ in whole.told}) == len(whole.told) == 8
    assert all(len(queries) == 2 * L // 4 for queries, _ in whole.told)
    assert {weight for _, weight in whole.told} == {1 / (4 * L * 0.25)}
    whole.trainer.evaluate()
    assert whole.told[-1][0] is None and whole.handle.queries is None
    again = Drawn(tmp_path / "again", checkpoint, texts)
    again.trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.told == whole.told[4:8]
    for name, value in whole.handle.state_dict().items():
        assert torch.equal(value, again.handle.state_dict()[name]), name


def test_the_trainers_loss_is_over_the_expected_number_of_queries(
    tmp_path: Path, checkpoint: Path, texts: Path
) -> None:
    model, tokenizer = load_model(checkpoint, dtype=torch.float32)
    packed = pack(load_documents(texts), tokenizer, sequence_length=L, seed=0)
    handle = attach(model, num_heads=2, head_dim=32)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = IndexerTrainer(handle, queries=0.3, args=arguments, train_dataset=packed)
    for step in range(4):
        trainer.state.global_step = step
        inputs = {name: x[None] for name, x in packed[step].items()}
        found = trainer.training_step(model, inputs)
        queries = draw_queries(L, 0.3, seed=arguments.seed, draw=f"step {step} batch 0 process 0")
        mean = torch.stack([loss.kl for loss in handle.losses().values()]).mean()
        assert float(found) == pytest.approx(float(mean) * len(queries) / (0.3 * L), rel=1e-5)
        assert len(queries) != 0.3 * L  # no whole number of blocks


def test_a_fraction_that_is_none_is_refused(checkpoint: Path) -> None:
    model, _ = load_model(checkpoint, dtype=torch.float32)
    with pytest.raises(ValueError, match="IndexerTrainer: queries must be above 0 and at most 1"):
        IndexerTrainer(attach(model), queries=0.0)
