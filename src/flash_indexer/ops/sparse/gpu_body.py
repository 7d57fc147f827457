"""The kernels' side of the sparse stage: which sizes they take. There are none yet; `stages` says what belongs here."""

from __future__ import annotations


def refusal() -> str | None:
    """Why the kernels don't take a problem; None where they do."""
    return "the sparse stage has no kernels yet"
