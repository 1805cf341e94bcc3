"""The ByteTransformer model."""

from stellarbyte.model.transformer import ByteDecoder, ByteDecoderLayer, ByteTransformer

__all__ = ["ByteDecoder", "ByteDecoderLayer", "ByteTransformer"]
