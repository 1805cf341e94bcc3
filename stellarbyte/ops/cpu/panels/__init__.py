"""Products of a weight's panels: 16 rows each, so that one vector register holds a number of each row."""
