"""Entries for processes of tests, in a module that imports nothing heavy: a spawned process imports it."""

from __future__ import annotations

import sys
import time
from typing import Any


def hung(_config: Any) -> int:
    """A run that its watchdog has ended."""
    sys.exit(76)


def waiting(_config: Any) -> int:
    """A run that does nothing for a minute."""
    time.sleep(60)
    return 0
