"""Serving on several ranks: what each holds of a model, how they sum and gather, and what fits where."""
