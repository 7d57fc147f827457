"""The sparse stage: each query's keys of largest index score, and attention over them."""
