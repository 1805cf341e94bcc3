"""The endpoints of the API. Each file defines one endpoint or a few related ones."""
