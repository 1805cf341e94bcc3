"""ByteTransformer checkpoints.

native.py checks and loads them, convert.py makes them from Hugging Face folders and GGUF files, source.py finds a model
by its name, demo.py finds the demo model, info.py describes checkpoints. Nothing is imported here, because no start
needs all of it.
"""
