"""CA-MTL: one conditional network for all tasks, steered by a learned vector for each task."""
