"""A process that dies or hangs: the others end in time and say so, and the run goes on to the same loss curve."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from flash_indexer.files.native import read_native
from flash_indexer.recipe.run_record import read_metrics

COMMAND = """
import os, sys
os.environ.update(environment)
sys.argv, sys.stderr = arguments, open(f"{out}.{environment['RANK']}", "a")
from flash_indexer.cli import main
"""
SIGNAL_SELF = """
import os, signal
import {owner} as owner
function, left = owner.{name}, [{call}]
def wrapper(*args, **options):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.{signal})
    return function(*args, **options)
owner.{name} = wrapper
"""
STUCK = """
import time
from flash_indexer.recipe import loop
from flash_indexer.parallel.heartbeat import Heartbeat
Heartbeat.GRACE = 1.0
function, left = loop.forward, [6]
def wrapper(*args, **options):
    left[0] -= 1
    return function(*args, **options) if left[0] else time.sleep(600)
loop.forward = wrapper
"""
ENDLESS_END = """
try:
    main()
finally:
    import time
    time.sleep(600)
"""
TIMEOUT = 8.0
HANG = 240.0  # seconds after which a process is taken to hang
KILLED = -signal.SIGKILL


def rows(out: Path) -> list[dict[str, Any]]:
    found = read_metrics(out / "metrics.jsonl")
    return [{name: x for name, x in row.items() if name != "seconds"} for row in found]


def command(checkpoint: str | Path, texts: str | Path, out: Path, *options: str, timeout: float = TIMEOUT) -> list[str]:
    words = f"flash-indexer warmup --model {checkpoint} --data {texts} --out {out} --resume --timeout {timeout}"
    sizes = "--sequence-length 32 --steps 12 --num-heads 2 --head-dim 32 --save-every 4 --evaluate-sequences 0"
    return [*words.split(), *sizes.split(), *options]


@pytest.mark.parametrize(
    ("where", "dying", "parallel", "count"),
    [
        (dict(owner="flash_indexer.recipe.loop", name="forward", call=6), 1, dict(), 2),
        pytest.param(
            dict(owner="flash_indexer.recipe.loop", name="sum_gradients", call=7), 1, dict(fsdp=True), 2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(owner="flash_indexer.files.checkpoint", name="save_file", call=2), 0, dict(cp=2), 2,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(owner="flash_indexer.models.handle", name="layer_kl", call=20), 2,
            dict(cp=2, tp=2), 4, marks=pytest.mark.slow,
        ),
    ],
    ids=["dp, in a forward", "fsdp, before the sum", "cp, while saving", "cp x tp, in a layer"],
)  # fmt: skip
def test_when_one_process_dies_the_others_say_so_and_the_run_goes_on(
    tmp_path: Path, runs: Any, tiny_settings: Any, where: Any, dying: int, parallel: dict[str, Any], count: int
) -> None:
    """The run that loses a process is the command line's, whose words count; `warm_up` goes on with it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = tiny_settings(warmup_steps=20, num_heads=2, rope_dim=None)
    runs.finish(runs.ranks(count, settings, whole, parallel=parallel))
    options = [word for name, value in parallel.items() for word in (f"--{name}", str(value)) if word != "True"]
    arguments = command(settings.model, settings.data, cut, *options, timeout=60.0)  # a busy machine is not a hang
    codes = [COMMAND + "main()"] * count
    codes[dying] = COMMAND + SIGNAL_SELF.format(**where, signal="SIGKILL") + "main()"
    started = runs.ranks(count, None, cut, codes=codes, arguments=arguments)
    for process in started:
        process.join(HANG)
    assert [process.exitcode for process in started] == [KILLED if n == dying else 1 for n in range(count)]
    for rank in {0, 1} - {dying}:
        said = Path(f"{cut}.{rank}").read_text()
        assert f"process {rank} of {count} lost contact with another process" in said, said
        assert f"the checkpoint in {cut / 'checkpoint'} is intact" in said and "--resume" in said, said
        assert "Traceback" not in said, said
    assert read_native(cut / "checkpoint").config.num_heads == 2
    runs.finish(runs.ranks(count, settings, cut, parallel=parallel))
    assert rows(cut) == rows(whole)


def test_when_one_process_hangs_the_other_ends_within_the_timeout(
    tmp_path: Path, runs: Any, checkpoint: Path, texts: Path
) -> None:
    """Even where the interpreter cannot end, as when NCCL does not let its group be taken down."""
    out = tmp_path / "run"
    stop = SIGNAL_SELF.format(owner="flash_indexer.recipe.loop", name="forward", call=3, signal="SIGSTOP")
    codes = [COMMAND + ENDLESS_END, COMMAND + stop + "main()"]
    first, hanging = runs.ranks(2, None, out, codes=codes, arguments=command(checkpoint, texts, out))
    try:
        first.join(HANG)
        assert first.exitcode == 1
    finally:
        hanging.kill()
        first.kill()
    said = Path(f"{out}.0").read_text()
    assert "or did not answer for 8 s" in said and "no checkpoint was written" in said, said


@pytest.mark.slow
def test_when_one_process_dies_the_other_ends_though_its_main_thread_is_stuck(
    tmp_path: Path, runs: Any, checkpoint: Path, texts: Path
) -> None:
    """As in a CUDA synchronisation behind an operation of NCCL that never ends."""
    out, die = tmp_path / "run", dict(owner="flash_indexer.recipe.loop", name="forward", call=6, signal="SIGKILL")
    codes = [COMMAND + STUCK + "main()", COMMAND + SIGNAL_SELF.format(**die) + "main()"]
    first, dying = runs.ranks(2, None, out, codes=codes, arguments=command(checkpoint, texts, out))
    dying.join(HANG)
    first.join(HANG)
    ended = first.exitcode, dying.exitcode
    first.kill()
    assert ended == (1, KILLED)
    said = Path(f"{out}.0").read_text()
    assert "error warmup: process 0 of 2 lost contact with another process" in said, said
    assert "(no sign of life from process 1); the checkpoint in" in said and "--resume" in said, said


def test_a_process_that_never_came_is_told(tmp_path: Path, runs: Any, checkpoint: Path, texts: Path) -> None:
    alone = "import os\nos.environ['WORLD_SIZE'] = '2'\n"
    out = tmp_path / "run"
    code = COMMAND.replace("from flash", f"{alone}from flash") + "main()"
    runs.finish(runs.ranks(1, None, out, codes=[code], arguments=command(checkpoint, texts, out)), 1)
    said = Path(f"{out}.0").read_text()
    assert "the processes did not all meet within 8 s" in said and "Traceback" not in said, said


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--cp", "2", "--fsdp"]], ids=["dp", "cp, fsdp"])
def test_killed_at_ten_random_moments(
    tmp_path: Path, runs: Any, checkpoint: Path, texts: Path, options: list[str]
) -> None:
    whole, cut, draw = tmp_path / "whole", tmp_path / "cut", random.Random(0)
    longer = ["--steps", "100", "--save-every", "1", *options]
    codes, began = [COMMAND + "main()"] * 2, time.monotonic()
    runs.finish(runs.ranks(2, None, whole, codes=codes, arguments=command(checkpoint, texts, whole, *longer)))
    duration, kills = time.monotonic() - began, 0
    while kills < 10:
        started = runs.ranks(2, None, cut, codes=codes, arguments=command(checkpoint, texts, cut, *longer))
        dying = draw.randrange(2)
        started[dying].join(draw.uniform(0, 0.5) * duration)
        if started[dying].exitcode is None:
            os.kill(started[dying].pid or 0, signal.SIGKILL)
            kills += 1
            started[1 - dying].join(HANG)
            assert started[1 - dying].exitcode in (0, 1)
        else:
            runs.finish(started)
            break
    runs.finish(runs.ranks(2, None, cut, codes=codes, arguments=command(checkpoint, texts, cut, *longer)))
    assert rows(cut) == rows(whole) and len(rows(cut)) == 100
