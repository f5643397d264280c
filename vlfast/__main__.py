"""`python -m vlfast` is the command line."""

import sys

from vlfast.cli import main

sys.exit(main())
