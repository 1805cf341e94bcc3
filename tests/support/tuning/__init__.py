"""Fine-tuning jobs in tests: their examples, a model, and processes that train."""
