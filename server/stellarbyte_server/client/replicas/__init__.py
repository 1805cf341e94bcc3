"""Several engines with one model as one: which gets a request, and what is of the whole."""
