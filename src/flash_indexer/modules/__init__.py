"""Trainable modules: the lightning indexer."""

from flash_indexer.modules.indexer import LightningIndexer

__all__ = ["LightningIndexer"]
