"""Plain torch: what task modules have in common, their maths, and what they may ask of a model.

Nothing here knows a model of transformers, a host or a file.
"""
