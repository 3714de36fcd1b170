"""A third-party method, defined in this folder alone: a convolution over neighbouring tokens, with a global mean.

It takes part in every matrix of tests through its record, and no other file knows it.
"""
