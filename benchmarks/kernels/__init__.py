"""Scripts for machines with a GPU, and for engine builds: `check_kernels.py` and `build_matrix.py`."""
