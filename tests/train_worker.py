"""`timm-ghn train` for tests: as the command is, but evaluated on one network instead of one of each family."""

from __future__ import annotations

import sys

from timm_ghn.cli import main
from timm_ghn.ghn import GHN
from timm_ghn.training import run
from timm_ghn.training.architectures import Bounds, Network, draw_architecture


def one_network(ghn: GHN) -> list[Network]:
    return [Network(draw_architecture("evaluation", 0, {"resnet": 1.0}, Bounds()), ghn)]


if __name__ == "__main__":
    run.evaluation_networks = one_network
    sys.exit(main(sys.argv[1:]))
