"""`stellarbyte chat`, `adapters` and `bench`: what people do at a terminal. Knows servers by HTTP only."""
