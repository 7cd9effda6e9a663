"""python -m hoppersim."""

import sys

from ._cli import main

sys.exit(main())
