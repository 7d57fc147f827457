"""`python -m flash_indexer` is the command `flash-indexer`; `accelerate launch -m flash_indexer` starts many."""

from flash_indexer.cli import main

if __name__ == "__main__":
    main()
