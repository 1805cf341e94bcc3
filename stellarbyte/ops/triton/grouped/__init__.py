"""Products with quantized matrices of which groups of inputs share a scale: int4, int8 and fp8."""
