"""Attackers beside ordinary clients."""
