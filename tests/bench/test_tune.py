"""The search for the fastest tiles, with measuring and compiling replaced, and what is written, shown and removed."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flash_indexer.bench import tune
from flash_indexer.bench.tune import FINAL_ROUNDS, ROUNDS, Result, Stage, search
from flash_indexer.bench.tune_worker import Lost, Worker
from flash_indexer.cli import app
from flash_indexer.kernels import tuned
from flash_indexer.kernels.sm_90 import sizes as tiles

GPU = "NVIDIA H100 80GB HBM3"
SIZE = tune.parse_size(64, 1, 128, 128, 64, None)
QUERY = Stage("gradient of index_q", "head_gradients_query", dict(D=128, E=64, HG=64))
DEFAULT, WINNER = (tiles.candidates(QUERY.kernel, QUERY.shape)[n] for n in (0, 3))
# answers by the sizes it is asked to measure: see SPEEDS
FAKE = """
import json, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
while True:
    request = json.loads(pipe.recv_bytes())
    what = {speeds!r}.get(str(sorted(request["sizes"].items())), 1.5)
    if what == "hang":
        time.sleep(1000)
    if what == "crash":
        sys.exit("an illegal memory access")
    answer = {{"error": what}} if isinstance(what, str) else {{"ms": what * 2.0, "default_ms": 2.0}}
    pipe.send_bytes(json.dumps(answer).encode())
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where winners are looked for, and a GPU by name."""
    monkeypatch.setattr(tuned, "location", lambda: tmp_path / "cache" / "tuned.json")
    monkeypatch.setattr(tune.torch.cuda, "get_device_name", lambda: GPU)
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    tuned.forget()
    yield tmp_path / "cache" / "tuned.json"
    tuned.forget()


def fake_worker(speeds):
    """A process that says these ratios of candidates, 1.5 of all others; the one that hangs is waited for briefly."""
    names = {str(sorted(sizes.items())): what for sizes, what in speeds}
    return Worker(FAKE.format(speeds=names), seconds=5.0)


def run(arguments):
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})


def candidates(n):
    return [{"N": i} for i in range(n)]


def measured(ratios, asked):
    """A measure function from N and rounds to a ratio; anything else than a number is a loss."""

    def measure(sizes, rounds):
        asked.append((sizes["N"], rounds))
        ratio = ratios[sizes["N"]]
        ratio = ratio[rounds == FINAL_ROUNDS] if isinstance(ratio, tuple) else ratio
        if isinstance(ratio, str):
            raise Lost(ratio)
        return 2.0 * ratio, 2.0

    return measure


def test_the_fastest_wins_and_is_measured_twice():
    asked, best = [], []
    result = search(candidates(4), measured({1: 0.9, 2: 0.8, 3: 1.2}, asked), best.append)
    assert result == Result({"N": 0}, {"N": 2}, 1.6, 2.0, [])
    assert asked == [(1, ROUNDS), (2, ROUNDS), (3, ROUNDS), (2, FINAL_ROUNDS), (1, FINAL_ROUNDS)]
    assert best == [0.9, 0.8, 0.8]


@pytest.mark.parametrize("ratio", [1.0, 0.995, (0.9, 0.995), (0.9, "no answer within 60 s")])
def test_what_is_not_faster_beyond_noise_does_not_win(ratio):
    result = search(candidates(2), measured({1: ratio}, []))
    assert result.best == result.default == {"N": 0} and result.ms == result.default_ms == 2.0


def test_the_second_measurement_decides_among_the_best():
    result = search(candidates(3), measured({1: (0.8, 0.95), 2: (0.85, 0.9)}, []))
    assert result.best == {"N": 2} and result.ms == pytest.approx(1.8)


def test_only_a_few_are_measured_again():
    asked = []
    search(candidates(10), measured(dict.fromkeys(range(10), 0.5), asked))
    assert sum(rounds == FINAL_ROUNDS for _, rounds in asked) == tune.FINALISTS


def test_losses_are_told_and_never_win():
    result = search(candidates(4), measured({1: "out is off by 1.0", 2: 0.9, 3: "no answer within 60 s"}, []))
    assert result.best == {"N": 2}
    assert result.lost == [({"N": 1}, "out is off by 1.0"), ({"N": 3}, "no answer within 60 s")]
    result = search(candidates(2), measured({1: "wrong"}, []))
    assert result.best == {"N": 0} and result.ms is None and result.default_ms is None


@pytest.fixture
def tuning(file, monkeypatch):
    """tuning(speeds, **options): a whole run, with every kernel said to be compiled."""
    monkeypatch.setattr(tune, "needs_gpu", lambda command: None)
    monkeypatch.setattr(tune.kernels, "attempt", lambda wanted: ((kernel, None) for kernel in wanted))

    def go(speeds, *, out=None, dry_run=False):
        text = io.StringIO()
        console = Console(file=text, width=200)
        with fake_worker(speeds) as worker:
            results = tune.run(SIZE, out=out, dry_run=dry_run, console=console, worker=worker)
        return results, text.getvalue()

    return go


def test_a_run_writes_what_kernels_then_use(tuning, file):
    """Hanging, crashing and wrong candidates beside a winner."""
    others = tiles.candidates(QUERY.kernel, QUERY.shape)[4:7]
    speeds = [(WINNER, 0.9), *zip(others, ("hang", "crash", "out is off by 1.0"), strict=True)]
    assert tuned.sizes(QUERY.kernel, GPU, QUERY.shape) == DEFAULT
    results, text = tuning(speeds)
    assert [x.best != x.default for x in results] == [False, False, True, False]
    assert tuned.sizes(QUERY.kernel, GPU, QUERY.shape) == WINNER, "at once, in the same process"
    assert tuned.sizes("head_gradients_key", GPU, QUERY.shape) == tiles.default("head_gradients_key", QUERY.shape)
    assert [why for _, why in results[2].lost] == [
        "no answer within 5 s", "its process ended: an illegal memory access", "out is off by 1.0"
    ]  # fmt: skip
    assert all(f"gradient of index_q: left out {tune.written(sizes)}" in text for sizes in others)
    assert tune.written(WINNER) in text and "0.900" in text and str(file) in text
    (entry,) = json.loads(file.read_text())["entries"]
    assert entry["ms"] == pytest.approx(1.8) and entry["default_ms"] == 2.0 and entry["tokens"] == sum(SIZE.documents)


def test_a_dry_run_writes_nothing(tuning, file):
    _, text = tuning([(WINNER, 0.9)], dry_run=True)
    assert not file.exists() and "not written" in text and tune.written(WINNER) in text


def test_winners_replace_only_their_own_kind(tuning, file, tmp_path):
    out = tmp_path / "elsewhere" / "mine.json"
    tuning([(WINNER, 0.9)], out=out)
    assert not file.exists()
    content = json.loads(out.read_text())
    content["entries"] += [content["entries"][0] | change for change in ({"gpu": "other"}, {"shape": {"D": 64}})]
    out.write_text(json.dumps(content))
    tuning([], out=out)
    left = json.loads(out.read_text())["entries"]
    assert left == content["entries"][1:], "the default is back for this kernel, the others are as they were"


def test_where_nothing_can_be_measured_nothing_is_replaced(tuning, file, monkeypatch):
    """Of the default and three candidates of each kernel: each takes a process of its own with it."""
    tuning([(WINNER, 0.9)])
    before, all_of = file.read_text(), tiles.candidates
    monkeypatch.setattr(tiles, "candidates", lambda *shape: all_of(*shape)[:4])
    everything = [
        (sizes, "wrong") for stage in tune.stages(SIZE) for sizes in tiles.candidates(stage.kernel, stage.shape)[1:]
    ]
    with pytest.raises(OSError, match="nothing could be measured"):
        tuning(everything)
    assert file.read_text() == before


def test_a_file_of_something_else_is_left_alone(tuning, tmp_path):
    other = tmp_path / "notes.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match="--out must be a file of tune, or not exist, got .*notes.json"):
        tuning([], out=other)
    with pytest.raises(ValueError, match="--out must be a file of tune to be removed"):
        tune.reset(other, print)
    assert other.read_text() == "{}"


def attempts(monkeypatch, broken):
    def attempt(wanted):
        for kernel in wanted:
            bad = kernel[0] == QUERY.kernel and any(x.items() <= dict(kernel[1]).items() for x in broken)
            yield kernel, "ptxas\nthe reason" if bad else None

    monkeypatch.setattr(tune.kernels, "attempt", attempt)


def test_candidates_that_do_not_compile_are_left_out(tuning, monkeypatch):
    attempts(monkeypatch, [WINNER])
    results, text = tuning([(WINNER, 0.5)])
    assert results[2].best == DEFAULT and results[2].lost == [(WINNER, "does not compile: the reason")]
    assert "the reason" in text


def test_a_default_that_does_not_compile_ends_it(tuning, monkeypatch):
    attempts(monkeypatch, [DEFAULT])
    with pytest.raises(OSError, match="head_gradients_query does not compile as it is shipped"):
        tuning([])


def test_without_a_compiler_it_says_so(tuning, monkeypatch):
    def attempt(wanted):
        raise RuntimeError("compiling needs nvcc")
        yield

    monkeypatch.setattr(tune.kernels, "attempt", attempt)
    with pytest.raises(OSError, match="tune: compiling needs nvcc"):
        tuning([])


def test_what_is_in_use_is_shown_and_removed(tuning, file):
    assert "there is none, the shipped tiles are used" in run(["tune", "--show"]).output
    tuning([(WINNER, 0.9)])
    text = run(["tune", "--show"]).output
    assert str(file) in text and f"{tune.written(WINNER)}; in use" in text
    content = json.loads(file.read_text())
    content["entries"][0]["gpu"] = "NVIDIA H200"
    file.write_text(json.dumps(content))
    assert "on NVIDIA H200" in (text := run(["tune", "--show"]).output) and "not used: of another GPU" in text
    file.write_text("damaged")
    assert "nothing of it is used" in run(["tune", "--show"]).output
    assert run(["tune", "--reset"]).exit_code == 0 and not file.exists()
    assert tuned.sizes(QUERY.kernel, GPU, QUERY.shape) == DEFAULT
    assert "there is none" in run(["tune", "--reset"]).output


def test_a_kill_while_writing_leaves_the_old_winners(tmp_path, runs):
    """A process that writes all the time, and is killed: whoever looks, whenever, finds winners."""
    file = tmp_path / "tuned.json"
    program = (
        "from pathlib import Path\nfrom flash_indexer.bench import tune\n"
        "stage = tune.Stage('', 'head_gradients_query', dict(D=128, E=64, HG=64))\n"
        "results = [(stage, tune.Result({'N': 0}, {'N': 1}, 1.0, 2.0, []))]\n"
        f"while True:\n    tune.write(Path({str(file)!r}), 'gpu' * 20000, results, 8192)\n"
    )
    process = runs.start(program, None, tmp_path)
    while not file.exists():
        assert process.is_alive()
        time.sleep(0.01)
    seen = [tuned.read(file) for _ in range(200)]
    process.kill()
    process.join()
    assert all(entries and entries[0]["sizes"] == {"N": 1} for entries in [*seen, tuned.read(file)])


def test_stages_follow_the_shapes():
    results = tune.stages(tune.parse_size(10, 2, 80, 40, 32, "100"))
    assert [stage.kernel for stage in results] == ["attention", "attention", *tiles.KERNELS[1:]]
    assert results[0].shape == dict(D=128, V=64, E=64, HG=5) and results[1].shape == results[0].shape | {"E": 0}
    (alone,) = tune.stages(tune.parse_size(128, 1, 128, 128, 128, "100"))
    assert alone.shape == dict(D=128, V=128, E=0, HG=128), "the per-head pass does not take 128 heads with E = 128"


@pytest.mark.parametrize("text, lengths", [("2048x2,5", (2048, 2048, 5)), ("7", (7,)), (" 3 , 4x1", (3, 4))])
def test_documents_are_read(text, lengths):
    assert tune.parse_size(64, 1, 128, 128, 64, text).documents == lengths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "3", "--key-heads", "2"], "tune: --heads must be 1 to 128 for each of --key-heads, got 3 and 2"),
        (["--heads", "256"], "tune: --heads must be 1 to 128 for each of --key-heads, got 256 and 1"),
        (["--key-heads", "0"], "tune: --heads must be 1 to 128 for each of --key-heads, got 64 and 0"),
        (["--head-dim", "576"], "tune: --head-dim must be 1 to 256, got 576"),
        (["--value-dim", "0"], "tune: --value-dim must be 1 to 256, got 0"),
        (["--index-dim", "48"], "tune: --index-dim must be of 32, 64, 128, got 48"),
        (["--documents", "2048*4"], "tune: --documents must be lengths like 2048x4,512, got '2048*4'"),
        (["--documents", "0x4"], "tune: --documents must be lengths like 2048x4,512, got '0x4'"),
        (["--show", "--reset"], "tune: give one of --dry-run, --show and --reset"),
    ],
)
def test_other_options_are_refused(options, message):
    done = run(["tune", *options])
    assert done.exit_code == 1 and message in done.output and "Traceback" not in done.output


@pytest.mark.skipif(tune.torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run(["tune", "--out", str(tmp_path / "x.json")])
    assert done.exit_code == 1
    assert "tune: needs a CUDA GPU of compute capability 9.0 (H100, H200) and tilelang, got none" in done.output
    assert not (tmp_path / "x.json").exists()
