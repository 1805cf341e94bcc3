"""From a model and a schedule to tokens."""
