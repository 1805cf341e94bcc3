"""Execution of scheduled steps."""
