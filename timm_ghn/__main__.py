"""`python -m timm_ghn` is the `timm-ghn` command."""

import sys

from timm_ghn.cli import main

sys.exit(main())
