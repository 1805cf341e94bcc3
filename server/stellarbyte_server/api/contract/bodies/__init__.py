"""The bodies of requests: fields with their bounds and descriptions."""
