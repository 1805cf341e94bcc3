"""Quantized weights: as other programs store them, and as ByteTransformer checkpoints keep them."""
