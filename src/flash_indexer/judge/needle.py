"""A needle in a haystack: a fact early in a long document, asked for at its end.

    filler ... The pass code of Marlow is 48213. ... filler
    What is the pass code of Marlow? The pass code of Marlow is 48213

A model that attends to K keys finds it only where its indexers select the fact's tokens. Scored are the nats of the
answer's tokens, and whether each of them is the most probable one.

Source: the needle-in-a-haystack test (Kamradt, 2023).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

DEPTHS = (0.1, 0.5, 0.9)
NAMES = ("Marlow", "Ellery", "Quentin", "Sabine", "Tobias", "Ottilie", "Leopold", "Harriet")


class Needle(NamedTuple):
    """One document, of which the last `answer` tokens are asked for; the fact stands at `depth`, 0 first, 1 last."""

    ids: Tensor  # int64 [L]
    answer: int
    depth: float


class NeedleScore(NamedTuple):
    """Means over so many documents: nats of an answer's token, and the part of answers that were found whole."""

    depth: float
    documents: int
    nats: float
    found: float


def needles(
    tokenizer: PreTrainedTokenizerBase, filler: Tensor, *, length: int, count: int, seed: int = 0
) -> list[Needle]:
    """`count` documents of `length` tokens for each of DEPTHS, with names and codes drawn from `seed`.

    Args:
        filler: int64 [n], tokens of ordinary text; each document takes as many as it needs, from another place.

    Raises:
        ValueError: filler is shorter than length, or length leaves no room for it.
    """
    draw, made = random.Random(seed), []
    for number in range(count):
        for depth in DEPTHS:
            name, code = draw.choice(NAMES), str(draw.randrange(10000, 100000))
            fact, question, answer = (
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (
                    f"\nThe pass code of {name} is {code}.\n",
                    f"\nWhat is the pass code of {name}? The pass code of {name} is",
                    f" {code}",
                )
            )
            room = length - len(fact) - len(question) - len(answer)
            if room < 1 or len(filler) < room:
                raise ValueError(
                    f"needles: length must leave room for at least a token of filler, and filler hold that much, got "
                    f"length={length}, {len(filler)} tokens of filler; give longer sequences"
                )
            begin = (number * room) % (len(filler) - room + 1)
            hay, place = filler[begin : begin + room].tolist(), int(depth * room)
            ids = [*hay[:place], *fact, *hay[place:], *question, *answer]
            made.append(Needle(torch.tensor(ids), len(answer), depth))
    return made


@torch.no_grad()
def needle_scores(model: torch.nn.Module, documents: Sequence[Needle]) -> list[NeedleScore]:
    """How well the model, dense or sparse as it is, gives the answers: by depth, ascending."""
    device = next(model.parameters()).device
    results: dict[float, list[tuple[float, bool]]] = {}
    for document in documents:
        ids = document.ids[None].to(device)
        logits = model(ids, use_cache=False).logits[0, -document.answer - 1 : -1].float()
        wanted = ids[0, -document.answer :]
        nats = float(-logits.log_softmax(-1).gather(1, wanted[:, None]).mean())
        results.setdefault(document.depth, []).append((nats, bool((logits.argmax(-1) == wanted).all())))
    return [
        NeedleScore(depth, len(found), sum(x for x, _ in found) / len(found), sum(y for _, y in found) / len(found))
        for depth, found in sorted(results.items())
    ]
