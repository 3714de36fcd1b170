"""Trains an adapter per task on one base model: the command `pal-adapters train` as a script.

python examples/train_tasks.py --data_dir DATA --tasks rte mrpc stsb --method pal --output_dir out
"""

import sys

from pal_adapters.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
