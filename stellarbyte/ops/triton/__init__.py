"""Triton kernels over packed weights, for `backends.gpu`. Imported only with a GPU or Triton's interpreter."""
