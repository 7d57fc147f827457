"""The judgement of an indexer: metrics, evaluation, plots, report."""
