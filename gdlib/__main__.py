"""`python -m gdlib` is the command `gdlib`."""

import sys

from gdlib.cli.main import main

sys.exit(main())
