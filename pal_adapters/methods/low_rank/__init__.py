"""Low-rank layers: a bottleneck parallel to each block."""
