"""A chat becomes requests: its tools, its grammar, its messages as a prompt."""
