"""`python -m intactkv_export`: the command line."""

from __future__ import annotations

import sys

from intactkv_export.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
