"""Learns how to combine adapters for a new task: the command `pal-adapters transfer` as a script.

    python examples/transfer.py --data_dir DATA --sources rte mrpc cola stsb sst2 qnli --target copa \\
        --method scalearn --output_dir out --source_dir sources
"""

import sys

from pal_adapters.cli import main

if __name__ == "__main__":
    sys.exit(main(["transfer", *sys.argv[1:]]))
