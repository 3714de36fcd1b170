"""The `Trainer` for many tasks, and its parts: arguments, data loaders, evaluation, logs, optimizers, checkpoints.

Everything that runs a training loop lives here; tasks, models and samplers know nothing about it.
"""
