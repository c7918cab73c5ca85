"""`depthattn convert` under its name in this folder."""

import sys

from megatron_depthattn.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
