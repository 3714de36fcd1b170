"""One backbone with a head for each task: heads, the route of each example, what trains, and the folder on disk.

Nothing here knows data sets or the Trainer.
"""
