"""What works on the model types of transformers, each built tiny and random from its config alone.

`python -m tests.zoo.types --part 1/12` tries a part of them and keeps its verdicts in `results/`;
`python -m tests.zoo.types --page` writes `docs/model-types.md` from all parts. Nothing here names a type to adapt it:
what a type needs in order to be built stands in `sizes.py`.
"""
