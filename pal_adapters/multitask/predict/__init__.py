"""From a trained model to answers: requests for any tasks in, named results out.

Encoding and decoding are those of training and evaluation, in `tasks/`. Nothing here knows the Trainer, and nothing
trains.
"""
