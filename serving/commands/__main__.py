"""`python -m serving.commands`: the command `tailor` where it is not installed."""

import sys

from serving.commands.app import main

sys.exit(main())
