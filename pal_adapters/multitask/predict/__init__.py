"""From a trained model to answers: requests of any tasks in, results with names out.

Encoding and decoding are those of training and evaluation, in `tasks/`. Nothing here knows the Trainer, and nothing
trains.
"""
