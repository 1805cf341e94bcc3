"""Ratings of answers, and the recent answers that can be rated, kept in --data-dir."""
