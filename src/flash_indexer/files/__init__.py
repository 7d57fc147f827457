"""What is kept on disk: atomic writes, native and exported checkpoints."""
