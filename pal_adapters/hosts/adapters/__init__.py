"""The binding to `adapters`: task modules in its blocks, compositions, files, fusions, and all that is replaced in it.

Nothing here names a method: methods register through `registration`. Everything that the binding needs of the host is
listed in `patches.REPLACED` and `expectations.RELIED_ON`; no other file replaces anything.
"""
