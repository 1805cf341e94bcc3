"""Answers of /v1/responses: output items, their events, and the whole object."""
