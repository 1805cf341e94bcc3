"""The bodies of requests: their fields, what each may hold, and what it means."""
