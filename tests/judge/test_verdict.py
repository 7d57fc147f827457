"""judge.verdict: grades and notes, at their boundaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from flash_indexer.judge.scores import Evaluation, MassAtK, TiesAtK
from flash_indexer.judge.verdict import grade, mass_notes, queries_behind, summary_lines, ties_note, verdict

MakeEvaluation = Callable[[], Evaluation]


def mass(indexer: float, window: float = 0.6, oracle: float = 0.8) -> MassAtK:
    return MassAtK(128, 512, 1000, indexer, oracle, window, indexer / oracle, window / oracle, 0.5)


@pytest.mark.parametrize(
    ("ratio", "indexer", "expected"),
    [
        (0.12, 0.77, "predicts the model's attention well"),
        (0.1201, 0.77, "there is more to learn"),
        (0.12, 0.75, "there is more to learn"),
        (0.12, 0.6, "no more attention than sink + window"),
        (0.4999, 0.79, "there is more to learn"),
        (0.5, 0.79, "has begun to learn"),
        (0.8999, 0.79, "has begun to learn"),
        (0.9, 0.79, "has learnt next to nothing"),
        (0.999, 0.79, "has learnt next to nothing"),
        (0.999, 0.5, "has learnt next to nothing"),
        (5.0, 0.79, "has learnt next to nothing"),
        (0.6, 0.5, "no more attention than sink + window"),
        (0.12, None, "predicts the model's attention well"),
        (0.7, None, "has begun to learn"),
        (None, None, "Too little text to judge"),
    ],
)
def test_grades(ratio: float | None, indexer: float | None, expected: str) -> None:
    assert expected in grade(ratio, None if indexer is None else mass(indexer))


def test_the_verdict_begins_with_the_grade(make_evaluation: MakeEvaluation) -> None:
    good = make_evaluation()
    poor = replace(good, mean=replace(good.mean, kl=2.4975, kl_over_uniform=0.999))
    assert verdict(poor).startswith("The indexer has learnt next to nothing: ") and "0.999 of the uniform" in verdict(
        poor
    )


def test_a_perplexity_far_off_is_given_as_a_multiple(make_evaluation: MakeEvaluation) -> None:
    good = make_evaluation()
    far = replace(good.perplexities[1], perplexity=100 * good.perplexities[0].perplexity)
    text = verdict(replace(good, perplexities=(good.perplexities[0], far, *good.perplexities[2:])))
    assert "668.59 (×100.0) with the indexer's" in text


def test_what_the_masses_rest_on(make_evaluation: MakeEvaluation) -> None:
    good = make_evaluation()
    assert queries_behind(good, 128) == "1,280 queries in each of 3 layers"
    one = replace(good, layers=(replace(good.layers[0], at_k=(replace(good.layers[0].at_k[1], queries=1),)),))
    assert queries_behind(one, 128) == "1 query in 1 layer"
    first, *others = good.layers
    uneven = replace(good, layers=(replace(first, at_k=(first.at_k[0], replace(first.at_k[1], queries=7))), *others))
    assert queries_behind(uneven, 128) == "2,567 queries in all of 3 layers, 7 to 1,280 in each"
    assert any(note.startswith("k = 128 rests on 2,567 queries") for note in mass_notes(uneven))
    assert mass_notes(good) == []


@pytest.mark.parametrize(("queries", "told"), [(49, True), (50, False)])
def test_fewer_than_fifty_queries_are_told(make_evaluation: MakeEvaluation, queries: int, told: bool) -> None:
    good = make_evaluation()
    layers = tuple(replace(x, at_k=tuple(replace(at, queries=queries) for at in x.at_k)) for x in good.layers)
    notes = mass_notes(replace(good, layers=layers))
    assert len(notes) == (2 if told else 0)


@pytest.mark.parametrize(("tied", "told"), [(0, False), (10, False), (11, True)])
def test_ties_above_one_percent_are_explained(make_evaluation: MakeEvaluation, tied: int, told: bool) -> None:
    good = make_evaluation()
    layers = tuple(replace(x, ties=(TiesAtK(64, 1000, tied * (x.layer == 1)),)) for x in good.layers)
    note = ties_note(replace(good, layers=layers))
    assert (note is not None) == told
    if note is not None:
        assert note.startswith("In layer 1, 1.1% of the queries that see more than 64 keys have equal index scores")


def test_the_commands_lines_say_queries_and_layers_and_what_is_missing(make_evaluation: MakeEvaluation) -> None:
    evaluation = replace(make_evaluation(), ks=(64, 128, 512), most_visible=900)
    first, *lines = summary_lines(evaluation)
    assert first == "held-out KL over uniform 0.089"
    assert lines[1].startswith("mass@128: indexer 77.9%, oracle 81.0%, sink + window 63.0%")
    assert lines[1].endswith("(1,280 queries in each of 3 layers, of those that see at least 512 keys)")
    assert lines[2].startswith(
        "k = 512 is not measured: it needs queries that see 2,048 keys, and none sees more than 900"
    )
