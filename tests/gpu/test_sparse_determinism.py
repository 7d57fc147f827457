"""A hundred runs of each operator of the sparse stage give the same bits where many queries add to few keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flash_indexer import dsa_attention, select_keys, sparse_attention, sparse_indexer_kl
from flash_indexer.ops import Selection
from flash_indexer.ops.sparse import gpu_index

pytestmark = pytest.mark.gpu
T, S, K, RUNS = 1500, 300, 64, 100
HEADS = {"latent": (16, 1, 576, 512), "grouped": (8, 2, 128, 128), "narrow": (9, 3, 64, 64)}  # H, G, D, V


class Tensors(NamedTuple):
    """Inputs of every operator; v is None where the keys hold the values."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    index_q: Tensor
    index_k: Tensor
    index_weights: Tensor
    d_out: Tensor
    key_start: Tensor
    key_end: Tensor

    def intervals(self) -> dict[str, Tensor]:
        return dict(key_start=self.key_start, key_end=self.key_end)

    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    def leaves(self, *names: str) -> dict[str, Tensor | None]:
        """Copies that want gradients."""
        values = {name: getattr(self, name) for name in names}
        return {name: None if x is None else x.clone().requires_grad_() for name, x in values.items()}

    def select(self) -> Selection:
        return select_keys(self.index_q, self.index_k, self.index_weights, **self.intervals(), topk=K)


INDEX = ("index_q", "index_k", "index_weights")


def make(heads: str) -> Tensors:
    """Each key is selected by some 300 queries; a quarter of the index scores are zeros: there are ties at K."""
    (H, G, D, V), generator = HEADS[heads], torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    key_end = (torch.arange(1, T + 1, device="cuda") * S // T).int()  # the first queries see no key
    return Tensors(
        normal(T, H, D), normal(S, G, D), None if V < D else normal(S, G, V), normal(T, 2, 64), normal(S, 64),
        normal(T, 2).float(), normal(T, H, V), torch.zeros_like(key_end), key_end,
    )  # fmt: skip


def assert_same_bits_every_time(run: Callable[[], dict[str, Tensor]]) -> None:
    first = run()
    for name, x in first.items():
        assert not x.isnan().any(), name
    for number in range(1, RUNS):
        for name, x in run().items():
            assert torch.equal(x, first[name]), (
                f"run {number}: {name} differs in {int((x != first[name]).sum())} places"
            )


def gradients(leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    found = {f"d_{name}": x.grad for name, x in leaves.items() if x is not None}
    assert all(x is not None for x in found.values())
    return found


def test_the_problems_have_contention_and_ties() -> None:
    x = make("narrow")
    selection = x.select()
    keys, times = selection.indices[selection.indices >= 0].unique(return_counts=True)
    assert len(keys) > 0.9 * S and int(times.max()) > 300
    full = selection.count == K
    assert int(((selection.scores == 0) & full[:, None]).any(1).sum()) > T // 10


def test_selection() -> None:
    x = make("grouped")
    assert_same_bits_every_time(lambda: x.select()._asdict())


@pytest.mark.parametrize("heads", HEADS)
def test_attention(heads: str) -> None:
    x = make(heads)
    selection, value_dim = x.select(), None if x.v is not None else HEADS[heads][3]

    def run() -> dict[str, Tensor]:
        leaves = x.leaves("q", "k", "v")
        made = sparse_attention(*leaves.values(), selection, softmax_scale=x.scale(), value_dim=value_dim)
        made.out.backward(x.d_out)
        return dict(out=made.out, lse=made.lse, **gradients(leaves))

    assert_same_bits_every_time(run)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_loss(heads: str, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_index, "dense_is_faster", lambda *_: dense)
    x = make(heads)
    selection = x.select()

    def run() -> dict[str, Tensor]:
        leaves = x.leaves(*INDEX)
        made = sparse_indexer_kl(x.q, x.k, *leaves.values(), selection, softmax_scale=x.scale())
        made.loss.backward()
        return dict(loss=made.loss, kl=made.kl, **gradients(leaves))

    assert_same_bits_every_time(run)


@pytest.mark.parametrize("kl", ["forward", "backward"])
@pytest.mark.parametrize("heads", HEADS)
def test_all_of_it(heads: str, kl: str) -> None:
    x = make(heads)
    value_dim = None if x.v is not None else HEADS[heads][3]

    def run() -> dict[str, Tensor]:
        leaves, kl_out = x.leaves("q", "k", "v", *INDEX), torch.empty(T, device="cuda")
        made = dsa_attention(
            *leaves.values(), **x.intervals(), softmax_scale=x.scale(), topk=K, value_dim=value_dim, kl=kl,
            kl_out=kl_out if kl == "backward" else None,
        )  # fmt: skip
        made.out.backward(x.d_out)
        if made.loss is not None:
            made.loss.backward()
        return dict(out=made.out, lse=made.lse, kl=made.kl, **gradients(leaves))

    assert_same_bits_every_time(run)
