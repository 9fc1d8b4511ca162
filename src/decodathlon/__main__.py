"""`python -m decodathlon` is the `decodathlon` command."""

import sys

from decodathlon.harness.commands.command import main

if __name__ == "__main__":
    sys.exit(main())
