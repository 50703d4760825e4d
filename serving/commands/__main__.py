"""Entry point of `python -m serving.commands`: the commands of serving only, without the package `pipeline`."""

import sys

from serving.commands.app import main

sys.exit(main())
