"""TileLang device programs for Hopper, and `compile`, which turns them into callables and caches them on disk."""
