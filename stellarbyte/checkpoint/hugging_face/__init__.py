"""Models in the format of Hugging Face: folders, and the Hub."""
