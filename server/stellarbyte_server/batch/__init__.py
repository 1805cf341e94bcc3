"""Files that clients upload and batches of requests over them, kept in --data-dir."""
