"""The command `tailor`, also as `python -m pipeline.commands`. Ctrl-C during the imports ends it with one line as later."""

import sys


def main() -> int:
    """Import the application and run it; returns its exit status, 130 if it was interrupted."""
    try:
        from pipeline.commands.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("tailor: interrupted\n")
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
