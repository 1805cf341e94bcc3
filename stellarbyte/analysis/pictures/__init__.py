"""The pictures of an analysis, drawn by matplotlib for a light and a dark page."""
