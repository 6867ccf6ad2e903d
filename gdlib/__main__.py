"""`python -m gdlib` is the command `gdlib`."""

import sys

from gdlib.cli import main

sys.exit(main())
