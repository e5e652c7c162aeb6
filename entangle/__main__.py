"""`python -m entangle`, also under `accelerate launch` and `torchrun`."""

import sys

from entangle.cli import main

sys.exit(main())
