"""The command line: `python -m tests.zoo.types --part 1/12`, and `--page` when all parts are there."""

from __future__ import annotations

import argparse
import warnings

import torch
import transformers

from .page import write_page
from .sweep import sweep


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.types", description=__doc__)
    parser.add_argument("--part", default="1/1", help="which part of all types, such as 3/12")
    parser.add_argument("--types", help="names of types, instead of a part; with --again their verdicts are renewed")
    parser.add_argument("--again", action="store_true", help="also try types that have verdicts already")
    parser.add_argument("--page", action="store_true", help="only write the page from the verdicts that are there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if options.page:
        write_page()
        return
    number, parts = (int(n) for n in options.part.split("/"))
    sweep(number, parts, options.types.split(",") if options.types else None, again=options.again)


if __name__ == "__main__":
    main()
