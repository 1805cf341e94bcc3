"""Mixture-of-experts layers on the GPU: routing and grouped products, all on the device, for CUDA graphs."""
