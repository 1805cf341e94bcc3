"""What every step computes: decisions over counts, without torch."""
