"""Models trained from nothing: what they cost, and how they hold beyond the length of their training."""
