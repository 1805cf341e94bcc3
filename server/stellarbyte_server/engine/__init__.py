"""The engine: scheduling, execution and detokenization."""
