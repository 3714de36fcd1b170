"""The Trainer and its parts: arguments, loaders, evaluation, checkpoints, runs on several processes, the model card.

What a model is made of and how it is saved belongs to `model/`.
"""
