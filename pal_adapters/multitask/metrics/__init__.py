"""How predictions are scored: plain functions of predictions and labels, and custom metrics.

Nothing here knows about tasks, tokenizers or models.
"""
