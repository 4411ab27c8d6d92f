"""``python -m megatron_echo.cpu_backend SCRIPT [ARGS ...]``."""

import sys

from megatron_echo import cpu_backend

cpu_backend.main(sys.argv[1:])
