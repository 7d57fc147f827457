"""Real models: attaching indexers to Transformers models, loading, checkpoints and export."""
