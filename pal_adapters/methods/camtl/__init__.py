"""CA-MTL: one network for all tasks, conditioned on a learned embedding of each task."""
