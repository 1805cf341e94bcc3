"""The ByteTransformer model: decoder.py for inference, transformer.py as a transformers model."""
