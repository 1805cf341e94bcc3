"""What happens at the steps of a run: signals, averages, checks, and what is shown."""
