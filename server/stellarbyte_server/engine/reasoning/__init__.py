"""The reasoning of an answer: found token by token, kept apart from the answer, bounded."""
