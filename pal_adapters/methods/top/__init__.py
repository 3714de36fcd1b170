"""Modules on top of the last block: attention of a small width, or a whole BERT layer."""
