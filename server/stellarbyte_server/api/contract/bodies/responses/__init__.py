"""The body of POST /v1/responses, and the chat that it asks for."""
