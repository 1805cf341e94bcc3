"""The YAML files of `stellarbyte train`: how they are read, and their sections."""
