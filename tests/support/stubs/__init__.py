"""Stand-ins: services of others, and servers that misbehave."""
