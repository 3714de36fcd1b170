"""What a task is, where its examples come from, and how they become tokens and scores.

Nothing here knows about model weights or training loops; only descriptions of heads and tasks come from `model/`.
"""
