"""The GPU backend: Triton kernels over packed weights, run as CUDA graphs. Imported only where there is a GPU."""
