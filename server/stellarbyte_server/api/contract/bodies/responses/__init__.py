"""The body of POST /v1/responses, and its conversion to a chat."""
