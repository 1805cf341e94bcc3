"""Fine-tuning jobs: their examples, their records, the processes that train, and the adapters that result."""
