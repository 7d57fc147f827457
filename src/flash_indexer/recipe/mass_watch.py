"""How much of the attention the indexers' choice holds, watched while they train."""

from __future__ import annotations

from dataclasses import replace

import torch

from flash_indexer.judge.metrics import MetricSums, layer_sums
from flash_indexer.models.attach import IndexerHandle, LayerCapture
from flash_indexer.parallel.context import gather_tokens
from flash_indexer.recipe.processes import Processes

MASS_K = 64
MASS_ROWS = 128


class MassWatch:
    """Attention mass in the indexer's top 64 of each layer's last query rows, on the steps where it is on.

    The last 128 tokens of each micro-batch, whichever context-parallel processes hold them; of queries drawn with
    probability f, those among the last 128 / f tokens, a quarter of all at most. With tensor parallelism
    the mean over processes is the mean over all heads.
    """

    def __init__(self, handle: IndexerHandle, processes: Processes) -> None:
        self.handle, self.processes, self.on = handle, processes, False
        self.sums = MetricSums()
        handle.observer = self._look

    def _look(self, capture: LayerCapture) -> None:
        if not self.on:
            return
        parallel = self.processes.parallel
        tokens = len(capture.k) * parallel.cp
        drawn = len(capture.q) / len(capture.k)
        last = MASS_ROWS if drawn == 1 else max(MASS_ROWS, min(MASS_ROWS / max(drawn, 1e-9), tokens / 4))
        rows = capture.key_end > tokens - last  # key_end is a token's position + 1
        names = ("q", "lse", "index_q", "index_weights", "key_start", "key_end")
        part = replace(capture, **{name: getattr(capture, name)[rows].detach() for name in names})
        if (group := parallel.group("cp")) is not None:
            k, index_k = (gather_tokens(x, group, layout=parallel.layout) for x in (part.k, part.index_k))
            part = replace(part, k=k, index_k=index_k)
        if len(part.q):
            self.sums = self.sums + layer_sums(part, ks=(MASS_K,))

    def take(self) -> float | None:
        """Mean mass since the last call, over all processes where it was on; None where no query saw enough keys."""
        sums, self.sums = self.sums, MetricSums()
        if not self.on:
            return None
        mass = sums.at_k.get(MASS_K)
        own = [0.0, 0.0] if mass is None else [float(mass.indexer), float(mass.queries)]
        total, queries = self.processes.sum(torch.tensor(own, device=self.processes.device)).tolist()
        return total / queries if queries else None

    def close(self) -> None:
        self.handle.observer = None
