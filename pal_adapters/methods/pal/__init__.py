"""Projected attention layers: narrow self-attention parallel to each block; the template for new methods."""
