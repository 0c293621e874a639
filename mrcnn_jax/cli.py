"""What the scripts share: one line and exit status 2 for a user's mistake."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mrcnn_jax.config import ConfigError


def run(main: Callable[[], None]) -> None:
    """Calls `main`; a ConfigError becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
