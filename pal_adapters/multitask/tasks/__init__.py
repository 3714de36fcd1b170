"""What a task is, where its examples come from, and how they become tokens and scores.

Nothing here knows a model with weights or a training loop; only the description of a head is taken from `model/`.
"""
