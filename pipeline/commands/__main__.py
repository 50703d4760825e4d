"""`python -m pipeline.commands`: run the command `tailor` if it is not installed as a script."""

import sys

from pipeline.commands.app import main

sys.exit(main())
