"""The GPU backend: a model, its steps and their CUDA graphs."""
