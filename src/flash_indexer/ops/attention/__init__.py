"""Attention with its logsumexp, and the per-head loss that runs in the same pass."""
