"""Sockets, connections, processes and the application on them."""
