"""Tests the claims of the papers on a base model and data sets of choice: `claims/` has the parts.

    python benchmarks/claims.py --claim houlsby pals scalearn ca_mtl --data_dir DATA --output_dir out --seeds 3 \\
        --budget 6

`DATA` contains the folders `glue` and `super_glue`, as for `examples/glue.py`. Every training run is a *piece* with
its own JSON file in `out/pieces`. The same command resumes: a piece that has its file is not run again, and a changed
setting makes another piece. Once the budget is spent, no further piece is started. Writes `out/table.md`, with a line
for each part of a claim, `out/claims.json` and pictures.
"""

import sys

from claims.run import main

if __name__ == "__main__":
    sys.exit(main())
