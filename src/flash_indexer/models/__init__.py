"""A Transformers model with indexers attached: capture, teacher, loading, sharding."""
