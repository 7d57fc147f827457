"""GPU kernels in TileLang: `catalog` says which there are, `cache` compiles and loads them, `tuned` chooses tiles.

A folder for each generation of GPUs (`sm_90`), and `device` for the CUDA code and the layout of work lists that they
share.
"""
