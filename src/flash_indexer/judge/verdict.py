"""How good indexers are, in words: grades, a few sentences, and what the masses and ties rest on.

The grade is by KL over uniform, the part of the uniform prediction's KL that the indexer still has (1: it knows no more
than which keys are visible; 0: it is the model's attention), and by the attention mass of its keys:

    0.9 and above   next to nothing is learnt: untrained indexers begin at about 1
    0.5 and above   it has begun to learn: most of the uniform prediction's error is still there
    above 0.12      it has learnt much, and there is more to learn
    up to 0.12      it predicts well, if its keys hold 95% or more of what the best keys hold as well: the recorded run
                    on SmolLM2-135M, whose perplexity rises by a tenth with 128 keys a query, ends at 0.06 and 97%

Whatever its KL, an indexer whose keys hold no more attention than a sink and a window has not learnt enough: these need
no training.
"""

from __future__ import annotations

from flash_indexer.judge.metrics import VISIBLE_PER_K
from flash_indexer.judge.scores import Evaluation, LayerScore, MassAtK, TiesAtK
from flash_indexer.judge.serving import NAMES

HEADLINE_K = 128
UNLEARNT_KL_OVER_UNIFORM, BEGUN_KL_OVER_UNIFORM, GOOD_KL_OVER_UNIFORM = 0.9, 0.5, 0.12
GOOD_INDEXER_OVER_ORACLE = 0.95
FEW_QUERIES = 50
MANY_TIES = 0.01


def percent(x: float) -> str:
    """0.123 -> 12.3%"""
    return f"{100 * x:.1f}%"


def change(x: float, base: float) -> str:
    """+12.3% from the base, or a factor where it is three times the base or more."""
    return f"{100 * (x / base - 1):+.1f}%" if x < 3 * base else f"×{x / base:.1f}"


def verdict(evaluation: Evaluation) -> str:
    """One to five sentences that say how good the indexers are, best read first."""
    mean, mass = evaluation.mean, headline(evaluation.mean)
    ratio = mean.kl_over_uniform
    sentences = [grade(ratio, mass)]
    if ratio is not None:
        sentences.append(
            f"Its KL to the model's attention is {ratio:.3f} of the uniform prediction's "
            f"({mean.kl:.3f} of {mean.uniform_kl:.3f} nats)."
        )
    if mass is not None:
        sentences.append(
            f"Its top {mass.k} keys hold {percent(mass.indexer)} of the attention, which is "
            f"{percent(mass.indexer_over_oracle)} of what the best {mass.k} keys hold "
            f"(sink + window: {percent(mass.window_over_oracle)}), "
            f"over queries that see at least {mass.min_visible:,} keys."
        )
    sparse = {p.selection: p for p in evaluation.perplexities if p.k == _headline_sparse_k(evaluation)}
    if "indexer" in sparse:
        dense = evaluation.perplexities[0].perplexity
        whose = {"indexer": "the indexer's", "oracle": "the oracle's", "window": "sink + window"}
        values = {name: sparse[name].perplexity for name in whose}
        changes = ", ".join(f"{values[n]:.2f} ({change(values[n], dense)}) with {whose[n]}" for n in whose)
        sentences.append(
            f"Perplexity is {dense:.2f} with all keys; with {sparse['indexer'].k} keys a query it is {changes}."
        )
    cost = serving_cost(evaluation)
    return " ".join([*sentences, *([cost] if cost else [])])


def arithmetic_name(arithmetic: str) -> str:
    """An arithmetic of index scores in words: a server's, or the dtype of the model."""
    return NAMES.get(arithmetic, arithmetic)


def serving_cost(evaluation: Evaluation) -> str | None:
    """What a server's arithmetic changes, in a sentence; None where the indexers were judged in the model's."""
    unserved = evaluation.unserved
    if unserved is None:
        return None
    parts = []
    mass, before = headline(evaluation.mean), headline(unserved.mean)
    shared = {at.k: at for at in unserved.overlaps if at.layer is None}
    if mass is not None and before is not None:
        parts.append(
            f"{100 * shared[mass.k].overlap:.2f}% of the top {mass.k} keys are the same, and their mass changes by "
            f"{100 * (mass.indexer - before.indexer):+.3f} points"
        )
    sparse = {p.k: p for p in evaluation.perplexities if p.selection == "indexer"}
    for was in unserved.perplexities:
        if was.k == _headline_sparse_k(evaluation):
            now = sparse[was.k].perplexity
            parts.append(
                f"perplexity with {was.k} keys a query by {100 * (now / was.perplexity - 1):+.3f}% "
                f"(from {was.perplexity:.3f} to {now:.3f})"
            )
    how = f"Judged with index scores in {arithmetic_name(evaluation.arithmetic)}"
    return f"{how}: beside {unserved.arithmetic}, {', '.join(parts)}." if parts else f"{how}."


def headline(score: LayerScore) -> MassAtK | None:
    """The mass at the measured k nearest to 128; None where none was measured."""
    return min(score.at_k, key=lambda mass: abs(mass.k - HEADLINE_K), default=None)


def grade(ratio: float | None, mass: MassAtK | None) -> str:
    """One sentence from KL over uniform and the headline's mass; see the module's docstring."""
    if ratio is None:
        return "Too little text to judge: every query sees one key."
    if ratio >= UNLEARNT_KL_OVER_UNIFORM:
        return "The indexer has learnt next to nothing: it predicts hardly better than the uniform prediction."
    if mass is not None and mass.indexer <= mass.window:
        return "The indexer has not learnt enough: its keys hold no more attention than sink + window."
    if ratio >= BEGUN_KL_OVER_UNIFORM:
        return "The indexer has begun to learn: most of the uniform prediction's error is still there."
    close = mass is None or mass.indexer_over_oracle >= GOOD_INDEXER_OVER_ORACLE
    if ratio <= GOOD_KL_OVER_UNIFORM and close:
        return "The indexer predicts the model's attention well."
    return "The indexer has learnt much of the model's attention, and there is more to learn."


def queries_behind(evaluation: Evaluation, k: int) -> str:
    """How many queries the masses at k rest on, such as: 514 queries in each of 30 layers."""
    counts = queries_of_layers(evaluation, k)
    layers = f"{len(counts)} layers" if len(counts) != 1 else "1 layer"
    if len(set(counts)) == 1:
        return f"{_queries(counts[0])} in {'each of ' * (len(counts) > 1)}{layers}"
    return f"{_queries(sum(counts))} in all of {layers}, {min(counts):,} to {max(counts):,} in each"


def queries_of_layers(evaluation: Evaluation, k: int) -> list[int]:
    """How many queries count at k in each layer where one does."""
    return [at.queries for score in evaluation.layers for at in score.at_k if at.k == k]


def rests_on_few(evaluation: Evaluation, k: int) -> bool:
    """Whether a layer's masses at k are means over fewer than 50 queries."""
    return min(queries_of_layers(evaluation, k), default=0) < FEW_QUERIES


def mass_notes(evaluation: Evaluation) -> list[str]:
    """What to know beside the masses: a raised --min-visible, few queries, and each k that no query qualifies for."""
    notes = []
    measured = {mass.k for mass in evaluation.mean.at_k}
    asked = evaluation.min_visible
    raised = [mass for mass in evaluation.mean.at_k if 0 < asked < mass.min_visible]
    if raised:
        values = ", ".join(f"{mass.min_visible:,} for k = {mass.k}" for mass in raised)
        notes.append(
            f"--min-visible {asked:,} is raised to {VISIBLE_PER_K}k: {values} (of few more keys than k, most choices "
            "hold most of the attention)."
        )
    for k in sorted(measured):
        if rests_on_few(evaluation, k):
            notes.append(
                f"k = {k} rests on {queries_behind(evaluation, k)}: too few to tell indexers apart; evaluate more or "
                "longer sequences."
            )
    for k in evaluation.ks:
        if k not in measured:
            notes.append(
                f"k = {k} is not measured: it needs queries that see {max(VISIBLE_PER_K * k, asked):,} keys, and none "
                f"sees more than {evaluation.most_visible:,}; evaluate longer documents and sequences."
            )
    return notes


def ties_note(evaluation: Evaluation) -> str | None:
    """What ties mean, where more than 1% of the queries of a layer have one at rank k; else None."""
    worst = worst_ties(evaluation)
    if worst is None or worst[1].share <= MANY_TIES:
        return None
    layer, ties = worst
    return (
        f"In layer {layer}, {percent(ties.share)} of the queries that see more than {ties.k} keys have equal index "
        f"scores at rank {ties.k} and {ties.k + 1}, as ReLU's exact zeros make them where index heads are few. Here "
        "the earlier key is selected; Transformers' indexer selects whichever torch.topk takes, which depends on the "
        "row's length. So an exported model can attend to other keys than were judged here, and appending a token can "
        "change the logits of earlier ones. Train with more index heads (with 8 no effect was seen)."
    )


def worst_ties(evaluation: Evaluation) -> tuple[int, TiesAtK] | None:
    """The layer and k with the largest share of tied rows; None where no query sees more than any k keys."""
    ties = [(score.layer or 0, at) for score in evaluation.layers for at in score.ties]
    return max(ties, key=lambda item: item[1].share, default=None)


def summary_lines(evaluation: Evaluation) -> list[str]:
    """What a command prints of an evaluation: KL, the masses with what they rest on, and notes."""
    ratio = evaluation.mean.kl_over_uniform
    lines = [f"held-out KL over uniform {ratio:.3f}" if ratio is not None else "held-out KL not available"]
    for mass in evaluation.mean.at_k:
        lines.append(
            f"mass@{mass.k}: indexer {mass.indexer:.1%}, oracle {mass.oracle:.1%}, sink + window {mass.window:.1%} "
            f"({queries_behind(evaluation, mass.k)}, of those that see at least {mass.min_visible:,} keys)"
        )
    more = [serving_cost(evaluation), *mass_notes(evaluation), ties_note(evaluation)]
    return [*lines, *(line for line in more if line)]


def _queries(count: int) -> str:
    return f"{count:,} {'query' if count == 1 else 'queries'}"


def _headline_sparse_k(evaluation: Evaluation) -> int | None:
    ks = {p.k for p in evaluation.perplexities if p.k is not None}
    return min(ks, key=lambda k: abs(k - HEADLINE_K), default=None)
