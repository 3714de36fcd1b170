"""Transformer blocks as found in models: their sites, their norms, and what their modules are called with.

`structures/` is data, one row per family; the rest reads it. Nothing here changes a model, and no method or host is
named here.
"""
