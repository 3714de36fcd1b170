"""Modules on top of the last block: narrow attention, or a whole BERT layer."""
