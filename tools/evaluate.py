"""`depthattn evaluate` under its name in this folder."""

import sys

from megatron_depthattn.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
