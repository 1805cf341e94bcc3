"""Training: from texts to a tokenizer, token files and a model. Serving imports nothing of it."""
