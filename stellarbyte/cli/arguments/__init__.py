"""The arguments of the `stellarbyte` command."""
