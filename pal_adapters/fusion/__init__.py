"""Combining trained adapters: AdapterFusion, ScaLearn in four sizes, fixed combinations, folding and reports.

The modules here are plain torch or dispatch by host; what a host needs is in `adapters/` and `peft/`. May import the
methods, as their adapters are sources, but nothing from `multitask`.
"""
