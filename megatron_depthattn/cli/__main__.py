"""``python -m megatron_depthattn.cli`` is ``depthattn``."""

import sys

from megatron_depthattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
