"""The contract defines requests and answers as the API documents them."""
