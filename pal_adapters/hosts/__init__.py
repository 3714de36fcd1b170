"""The bindings to the host libraries, one folder each, and what both share.

Names no method: methods register with a binding. `which.py` says which host a model belongs to, `unchanged.py` makes
changes all-or-nothing, and `expectations.py` checks that an installed host is what the bindings rely on.
"""
