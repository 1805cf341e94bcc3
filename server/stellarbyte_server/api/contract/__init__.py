"""Requests and answers as the API documents them."""
