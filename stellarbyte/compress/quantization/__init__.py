"""Calibrated quantization of matrices, layer by layer."""
