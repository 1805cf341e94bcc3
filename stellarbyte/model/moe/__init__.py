"""Mixtures of experts: router.py chooses, dispatch.py sends tokens to experts.py, layer.py joins them."""
