"""ByteTransformer checkpoints.

native.py reads and loads them, convert.py makes them from Hugging Face folders and GGUF files, demo.py finds a model by
path or makes the demo model, info.py describes them. Nothing is imported here: a start needs only some of it.
"""
