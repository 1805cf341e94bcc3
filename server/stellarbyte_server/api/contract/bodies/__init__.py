"""Bodies define the fields of requests, with their bounds and meanings."""
