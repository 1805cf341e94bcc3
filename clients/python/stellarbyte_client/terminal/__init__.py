"""The terminal commands `stellarbyte chat`, `adapters` and `bench`. Uses HTTP only."""
