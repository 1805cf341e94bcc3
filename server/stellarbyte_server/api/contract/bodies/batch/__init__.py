"""Bodies, forms and queries of /v1/files and /v1/batches."""
