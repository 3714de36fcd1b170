"""Combinations of source adapters in PEFT: configs, reading sources, tuners, layers, folding and reports.

Sources are LoRA adapters, Houlsby bottlenecks or task modules of this package. The maths is in `fusion/units.py` and
`fusion/layer.py`.
"""
