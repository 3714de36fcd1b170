"""Projected attention layers: narrow self-attention parallel to each block."""
