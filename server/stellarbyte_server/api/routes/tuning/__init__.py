"""/v1/fine_tuning/jobs, and the deletion of their models."""
