"""`timm-ghn train` for tests: as the command is, but evaluated on two networks instead of one of each family."""

from __future__ import annotations

import itertools
import sys

from timm_ghn.cli import main
from timm_ghn.training import run

if __name__ == "__main__":
    of_all_families = run.evaluation_networks
    run.evaluation_networks = lambda ghn: list(itertools.islice(of_all_families(ghn), 2))
    sys.exit(main(sys.argv[1:]))
