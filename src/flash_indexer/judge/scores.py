"""What an evaluation says, as plain data: means from sums, and to and from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flash_indexer.judge.metrics import MetricSums


@dataclass(frozen=True)
class MassAtK:
    """Means over the `queries` queries that see at least `min_visible` keys; masses are fractions of 1."""

    k: int
    min_visible: int
    queries: int
    indexer: float
    oracle: float
    window: float
    indexer_over_oracle: float
    window_over_oracle: float
    recall: float


@dataclass(frozen=True)
class TiesAtK:
    """Of the `queries` queries that see more than k keys, `tied_rows` have equal scores at rank k and at k + 1.

    taken_otherwise: of these, those for which torch.topk takes other keys; None in reports from before it was counted.
    """

    k: int
    queries: int
    tied_rows: int
    taken_otherwise: int | None = None

    @property
    def share(self) -> float:
        """tied_rows / queries, from 0 to 1."""
        return self.tied_rows / self.queries


@dataclass(frozen=True)
class LayerScore:
    """Means over the `queries` queries of one layer that see a key; KL in nats. layer None: all layers."""

    layer: int | None
    queries: int
    kl: float
    uniform_kl: float
    kl_over_uniform: float | None
    at_k: tuple[MassAtK, ...]
    ties: tuple[TiesAtK, ...] = ()


@dataclass(frozen=True)
class Perplexity:
    """exp(loss), loss in nats a predicted token; selection "dense" has k None.

    sparse_fraction: the part of all layers' queries that see more than k keys and so lose some.
    """

    selection: str
    k: int | None
    loss: float
    perplexity: float
    sparse_fraction: float


@dataclass(frozen=True)
class RowBlock:
    """Consecutive queries of one document: where they attend, and where the indexer expects them to.

    teacher, indexer: [rows][columns] probabilities; each column is the largest of `keys_per_column` keys.
    first_query counts from the first key shown, as the columns do: the document's first, if nothing hides it.
    """

    layer: int
    first_query: int
    num_keys: int
    keys_per_column: int
    teacher: tuple[tuple[float, ...], ...]
    indexer: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class OverlapAtK:
    """Of its k keys, the part that the served indexer has in common with the unserved one: the mean over queries.

    layer None: all layers. queries, min_visible: as in MassAtK.
    """

    layer: int | None
    k: int
    min_visible: int
    queries: int
    overlap: float


@dataclass(frozen=True)
class Unserved:
    """The same indexers, on the same text, in the arithmetic of the model that they were captured from.

    arithmetic: that dtype. perplexities: of the unserved indexer's keys alone. overlaps: of all layers, then of each.
    """

    arithmetic: str
    mean: LayerScore
    layers: tuple[LayerScore, ...]
    perplexities: tuple[Perplexity, ...]
    overlaps: tuple[OverlapAtK, ...]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. `tokens` were read, `predicted` of them have a predecessor in their document.

    ks, min_visible: what was asked for. most_visible: keys that the query with most of them sees. Records of versions
    that did not count ties lack these, as they lack ties: 0 and ().
    arithmetic: in which the index scores were formed, one of `judge.serving.ARITHMETICS` or the model's dtype; "" in
    older records. unserved: for comparison, where the indexers were judged in a server's arithmetic.
    """

    sequences: int
    tokens: int
    predicted: int
    mean: LayerScore
    layers: tuple[LayerScore, ...]
    perplexities: tuple[Perplexity, ...]
    row_block: RowBlock
    ks: tuple[int, ...] = ()
    min_visible: int = 0
    most_visible: int = 0
    arithmetic: str = ""
    unserved: Unserved | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for json.dump."""
        plain = asdict(self)
        plain["layers"] = [_score_to_dict(score) for score in plain["layers"]]
        plain["mean"] = _score_to_dict(plain["mean"])
        plain["perplexities"], plain["ks"] = list(plain["perplexities"]), list(plain["ks"])
        for name in ("teacher", "indexer"):
            plain["row_block"][name] = [list(row) for row in plain["row_block"][name]]
        if (unserved := plain["unserved"]) is not None:
            unserved["mean"] = _score_to_dict(unserved["mean"])
            unserved["layers"] = [_score_to_dict(score) for score in unserved["layers"]]
            unserved["perplexities"], unserved["overlaps"] = list(unserved["perplexities"]), list(unserved["overlaps"])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`."""
        block = dict(plain["row_block"])
        for name in ("teacher", "indexer"):
            block[name] = tuple(tuple(row) for row in block[name])
        return cls(
            sequences=plain["sequences"],
            tokens=plain["tokens"],
            predicted=plain["predicted"],
            mean=_score_from_dict(plain["mean"]),
            layers=tuple(_score_from_dict(score) for score in plain["layers"]),
            perplexities=tuple(Perplexity(**perplexity) for perplexity in plain["perplexities"]),
            row_block=RowBlock(**block),
            ks=tuple(plain.get("ks", ())),
            min_visible=plain.get("min_visible", 0),
            most_visible=plain.get("most_visible", 0),
            arithmetic=plain.get("arithmetic", ""),
            unserved=_unserved_from_dict(plain.get("unserved")),
        )


def score(layer: int | None, sums: MetricSums) -> LayerScore:
    """Means from sums. kl_over_uniform is None where every query sees one key: uniform is exact then."""
    at_k = []
    for k, mass in sums.at_k.items():
        indexer, oracle, window, recall = (
            x / mass.queries for x in (mass.indexer, mass.oracle, mass.window, mass.recall)
        )
        at_k.append(
            MassAtK(
                k,
                mass.min_visible,
                mass.queries,
                indexer,
                oracle,
                window,
                indexer / oracle,
                window / oracle,
                recall,
            )
        )
    n = max(1, sums.queries)
    ratio = sums.kl / sums.uniform_kl if sums.uniform_kl > 0 else None
    ties = tuple(TiesAtK(k, tie.queries, tie.tied_rows, tie.taken_otherwise) for k, tie in sums.ties.items())
    return LayerScore(layer, sums.queries, sums.kl / n, sums.uniform_kl / n, ratio, tuple(at_k), ties)


def _score_to_dict(plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "at_k": list(plain["at_k"]), "ties": list(plain["ties"])}


def _score_from_dict(plain: Mapping[str, Any]) -> LayerScore:
    at_k = tuple(MassAtK(**mass) for mass in plain["at_k"])
    return LayerScore(**{**plain, "at_k": at_k, "ties": tuple(TiesAtK(**tie) for tie in plain.get("ties", ()))})


def _unserved_from_dict(plain: Mapping[str, Any] | None) -> Unserved | None:
    if plain is None:
        return None
    return Unserved(
        plain["arithmetic"],
        _score_from_dict(plain["mean"]),
        tuple(_score_from_dict(score) for score in plain["layers"]),
        tuple(Perplexity(**perplexity) for perplexity in plain["perplexities"]),
        tuple(OverlapAtK(**overlap) for overlap in plain["overlaps"]),
    )
