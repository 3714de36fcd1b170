"""How values get from a block to a task module and back: hooks, masks, generation caches, mixed batches.

Everything that belongs to one call is kept per thread (`call.py`). Nothing here names a method or imports a host.
"""
