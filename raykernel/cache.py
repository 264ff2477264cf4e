"""The folder of what is fetched, converted or measured once on a machine."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """$RAYKERNEL_CACHE, or raykernel's part of the user's cache."""
    chosen = os.environ.get("RAYKERNEL_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("raykernel"))
