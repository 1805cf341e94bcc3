"""Attention and other kernels; reference.py is the readable truth."""
