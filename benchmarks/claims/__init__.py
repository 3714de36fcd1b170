"""The parts of `claims.py`: options, pieces, recipes, training, plans of the claims, verdicts, tables and pictures.

Everything here is built on the public interface of `pal_adapters` and its command line; no training loop lives here.
"""
