"""All targets on one GPU: what is measured, and the programs that measure it."""
