"""The page of an analysis: HTML without scripts, its style sheet beside it."""
