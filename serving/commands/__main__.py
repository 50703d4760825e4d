"""`python -m serving.commands`: the commands of serving alone, where the pipeline is not on the path."""

import sys

from serving.commands.app import main

sys.exit(main())
