"""`python -m lab NAME`: the same as `dopd experiment NAME`."""

import sys

from dopd.cli.main import main

sys.exit(main(["experiment", *sys.argv[1:]]))
