"""The processes of a run: how many do what, their sums, and what is said when one of them is gone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.rendezvous import _torchelastic_use_agent_store

from flash_indexer.files.atomic import readable_directory
from flash_indexer.parallel.context import LAYOUTS, context_positions
from flash_indexer.parallel.gradients import all_sum
from flash_indexer.parallel.heartbeat import Heartbeat
from flash_indexer.parallel.mesh import Parallel, make_parallel
from flash_indexer.recipe.progress import print_error

LONGEST_TIMEOUT = 1e6  # seconds


@dataclass(frozen=True)
class ParallelSettings:
    """How a run is shared out over its processes. Not part of its record: it may change when a run is resumed.

    Attributes:
        cp: processes that share a sequence. tp: processes that share its heads. The rest share the data.
        layout: how cp cuts a sequence: "zigzag" balances causal attention, "contiguous" does not.
        fsdp: shard the model over the processes by FSDP2, instead of a copy on each.
        timeout: seconds without an answer after which a process gives the others up.
        command: what messages begin with.
    """

    cp: int = 1
    tp: int = 1
    layout: str = "zigzag"
    fsdp: bool = False
    timeout: float = 600.0
    command: str = "warmup"

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no run can use."""
        for name in ("cp", "tp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.command}: {name} must be at least 1, got {getattr(self, name)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"{self.command}: layout (--cp-layout) must be one of {LAYOUTS}, got {self.layout!r}")
        if not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(
                f"{self.command}: timeout must be positive and at most {LONGEST_TIMEOUT:g} s, got {self.timeout}"
            )


class Processes:
    """This process and the others. Started by torchrun or accelerate launch, or one process alone.

    Raises:
        ConnectionError: the others were not there in time. ValueError: their number is no multiple of cp · tp.
    """

    def __init__(self, settings: ParallelSettings) -> None:
        self.settings = settings
        limit = InitProcessGroupKwargs(timeout=timedelta(seconds=settings.timeout))
        try:
            accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[limit])
            sizes = {name: getattr(settings, name) for name in ("cp", "tp", "layout", "timeout")}
            self.parallel: Parallel = make_parallel(accelerator.device.type, **sizes)
        except RuntimeError as error:
            if not _is_lost_contact(error):
                raise
            raise ConnectionError(
                f"{settings.command}: the processes did not all meet within {settings.timeout:g} s "
                f"({_first_line(error)}); check that each was started, and that MASTER_ADDR and MASTER_PORT name a "
                "machine that all can reach"
            ) from error
        self.device: torch.device = accelerator.device
        self.count: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, each token of a batch counted once: the copies that tp makes share their count."""
        return all_sum(x, timeout=self.settings.timeout).div_(self.parallel.tp)

    def wait(self) -> None:
        """Returns when all processes have called it."""
        all_sum(torch.zeros(1, device=self.device), timeout=self.settings.timeout)

    def agree(self, out: Path, number: int) -> None:
        """Returns when all processes have called it with the same number, which stands for what `out` holds.

        Raises:
            ValueError: in every process, where one has another number.
        """
        each = self._all(number)
        if bool((each != each[0]).any()):
            other = int((each != each[0]).nonzero()[0])
            raise ValueError(
                f"{self.settings.command}: --out must be one folder that all processes see, got {out}, where process "
                f"{other} found another run, or another step of it, than process 0; use a shared disk"
            )

    @contextmanager
    def refusing_together(self, what: str = "begin", checkpoint: Path | None = None) -> Iterator[None]:
        """What is refused in one process ends all, each with a message. The block itself must not communicate.

        Args:
            what: the processes do in the block. checkpoint: of the run, whose state is said.

        Raises:
            ValueError: in the processes whose own block ended well; names one whose block didn't.
        """
        try:
            yield
        except Exception:
            with suppress(RuntimeError):  # lost contact: this process's own error says more
                self._all(1)
            raise
        refusals = self._all(0)
        if refusals.any():
            then = "" if checkpoint is None else f"; {saved_state(checkpoint)}: start again with --resume when it can"
            raise ValueError(
                f"{self.settings.command}: process {int(refusals.nonzero()[0])} could not {what}; see its message, in "
                f"its output{then}"
            )

    def _all(self, own: int) -> Tensor:
        """The number of each process, [count]."""
        each = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        each[self.rank] = own
        return all_sum(each, timeout=self.settings.timeout)

    @property
    def shards(self) -> bool:
        """Whether FSDP2 shares the model's parameters out over the processes."""
        return self.settings.fsdp and self.count > 1

    @property
    def pieces(self) -> int:
        """A sequence's length is a multiple of this, so that cp processes take equal parts."""
        cp = self.parallel.cp
        return 1 if cp == 1 else 2 * cp if self.parallel.layout == "zigzag" else cp

    def check_length(self, sequence_length: int) -> None:
        """Raises ValueError where cp processes can't take equal parts of a sequence."""
        if sequence_length % self.pieces:
            raise ValueError(
                f"{self.settings.command}: sequence_length must be a multiple of {self.pieces} for "
                f"cp={self.parallel.cp} in layout {self.parallel.layout!r}, got {sequence_length}"
            )

    def part(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's tokens [1, n] of a batch [B, L], whose rows are one sequence when cp > 1."""
        parallel = self.parallel
        if parallel.cp == 1:
            return batch
        tokens = batch["input_ids"].numel()
        own = context_positions(tokens, parallel.cp, parallel.cp_rank, layout=parallel.layout)
        return {name: x.flatten()[own.to(x.device)][None] for name, x in batch.items()}

    def own_tokens(self, tokens: Tensor, length: int) -> Tensor:
        """Of some of a batch's `length` tokens, ascending, those of this process, counted among all its own."""
        parallel = self.parallel
        if parallel.cp == 1:
            return tokens
        own = context_positions(length, parallel.cp, parallel.cp_rank, layout=parallel.layout)
        return torch.isin(own, tokens).nonzero()[:, 0]

    @contextmanager
    def telling(self, checkpoint: Path) -> Iterator[None]:
        """Turns the loss of another process into one message for a person. At its end all processes wait for all.

        Gloo fails at once when a process dies, and after the timeout when one hangs. NCCL may let this process wait on
        its GPU for ever, where nothing can be raised: after the timeout, and a grace, the message is then printed
        and the process ends with exit code 1.

        Raises:
            ConnectionError: names the process, what happened, the checkpoint and how to go on.
        """
        saved = f"a checkpoint in {checkpoint} is intact"
        stuck = self._lost_contact("it is stuck itself, in a call that lets no thread of it run", saved)
        alive = Heartbeat(self.settings.timeout, partial(self._end, checkpoint), f"error {stuck}")
        try:
            with alive if self.count > 1 else nullcontext():
                yield
                self.wait()
        except RuntimeError as error:
            if not _is_lost_contact(error):
                raise
            raise self._lost_contact(_first_line(error), saved_state(checkpoint)) from error

    def _lost_contact(self, reason: str, saved: str) -> ConnectionError:
        return ConnectionError(
            f"{self.settings.command}: process {self.rank} of {self.count} lost contact with another process, which "
            f"died or did not answer for {self.settings.timeout:g} s ({reason}); {saved}: look for the first error of "
            "all processes, then start again with --resume, with as many processes or another number"
        )

    def _end(self, checkpoint: Path, reason: str) -> NoReturn:
        """From a thread, while the main thread is stuck, perhaps with the lock of stdout in hand."""
        try:
            print_error(self._lost_contact(reason, saved_state(checkpoint)))
        finally:
            os._exit(1)


def restart_warning(command: str = "warmup") -> str | None:
    """What to say where torchrun, should it start the processes of a run again, hands them the store of dead ones.

    torchrun does so under static rendezvous (--master-addr, --master-port, accelerate launch) always, and under c10d
    unless a variable of torch's forbids it; torch's own rendezvous tells which.
    """
    if not (dist.is_torchelastic_launched() and _torchelastic_use_agent_store()):
        return None
    return (
        f"{command}: if torchrun starts this run again by itself (--max-restarts), its new processes may not find each "
        "other: for that, launch it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d, without "
        "--master-addr and --master-port"
    )


def is_main_process() -> bool:
    """True in the one process of a run that writes and reports."""
    return bool(PartialState().is_main_process)


def leave() -> None:
    """Takes this process out of the group, if it is in one, so that it can end without a warning."""
    if dist.is_initialized():
        PartialState().destroy_process_group()


def end_if_shared(code: int) -> None:
    """Ends this process at once if others belong to its group: the orderly end of NCCL can hang where one is gone."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # closed
                stream.flush()
        os._exit(code)


def saved_state(checkpoint: Path) -> str:
    """What a message says of a run's checkpoint."""
    written = readable_directory(checkpoint).exists()
    return f"the checkpoint in {checkpoint} is intact" if written else "no checkpoint was written"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _is_lost_contact(error: RuntimeError) -> bool:
    """NCCL's errors have a type of their own; gloo's and those of a wait are known by their words alone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo/transport", "timed out"))
