"""Answers of /v1/responses: items of output, their events, and the whole object."""
