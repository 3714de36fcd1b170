"""A method of another package, defined in this folder alone: a convolution over neighbouring tokens.

It takes part in every matrix of tests through its record, and no other file knows it.
"""
