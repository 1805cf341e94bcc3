"""Steps that fail: which requests are at fault, and how the others go on."""
