"""The commands of `stellarbyte train`, one in each module."""
