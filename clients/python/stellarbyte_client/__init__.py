"""What a StellarByte server offers beyond OpenAI's API, for Python programs. Knows the server by HTTP only."""
