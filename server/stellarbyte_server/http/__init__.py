"""The application, its sockets, connections and processes."""
