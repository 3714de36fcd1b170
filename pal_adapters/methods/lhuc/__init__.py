"""LHUC: one learned scale for each channel of a block."""
