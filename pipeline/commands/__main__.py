"""`python -m pipeline.commands`: the command `tailor` where it is not installed."""

import sys

from pipeline.commands.app import main

sys.exit(main())
