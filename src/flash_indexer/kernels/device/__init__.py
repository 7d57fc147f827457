"""What kernels of every generation share: CUDA headers, the layout of work lists, how headers become one source."""
