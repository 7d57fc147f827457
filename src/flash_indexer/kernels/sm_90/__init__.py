"""Kernels for compute capability 9.0 (Hopper): a .py and a .cuh each, and `sizes`, what they are compiled for."""
