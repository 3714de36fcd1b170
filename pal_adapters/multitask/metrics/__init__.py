"""How predictions are scored: plain functions of predictions and labels, and custom metrics.

Nothing here knows tasks, tokenizers or models.
"""
