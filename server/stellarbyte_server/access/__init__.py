"""Access control: API keys and access rules."""
