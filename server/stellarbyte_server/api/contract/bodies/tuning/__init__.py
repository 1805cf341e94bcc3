"""Bodies and queries of /v1/fine_tuning."""
