"""Models in Hugging Face's format: folders, and the Hub."""
