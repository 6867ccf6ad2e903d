"""`python -m benchmarks`."""

import sys

from benchmarks.bench import command

sys.exit(command())
