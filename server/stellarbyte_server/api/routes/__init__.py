"""Each file defines one endpoint, or a few that belong together."""
