"""Which task is drawn next and which of its examples are trained on.

The samplers work on the sizes of the tasks and the selectors on logits; neither runs a model.
"""
