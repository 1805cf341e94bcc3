"""Training of byte-level BPE tokenizers, in stages of growing vocabularies."""
