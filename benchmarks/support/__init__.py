"""What benchmarks share: records of results, and an engine without a model."""
