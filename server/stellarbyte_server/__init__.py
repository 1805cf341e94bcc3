"""The StellarByte service: an OpenAI-compatible HTTP process and an engine process."""
