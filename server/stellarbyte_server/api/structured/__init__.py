"""JSON schemas and tool calls are enforced by grammars."""
