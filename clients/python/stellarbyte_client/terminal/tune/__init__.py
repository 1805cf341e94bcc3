"""`stellarbyte tune`: examples become an adapter on a running server."""
