"""Transformer blocks as found in models: their sites, their norms, what their modules are called with.

`structures.py` is data, one row a family; the rest reads it. Nothing here changes a model, and no method or host is
named here.
"""
