"""The ranks of a tensor-parallel engine: rank 0 schedules and sends every plan; all compute it."""
