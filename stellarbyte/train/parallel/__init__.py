"""Runs on several ranks: who holds what of a model, who reads which rows, and who speaks."""
