"""Failed steps: find the requests at fault and continue the others."""
