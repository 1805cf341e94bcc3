"""Drafts: guesses of a sequence's next tokens, which one step verifies. Counts and token ids, without torch."""
