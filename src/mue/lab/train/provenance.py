"""Where a number comes from: what is recorded beside every result."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import mue


def provenance() -> dict[str, Any]:
    """Versions, machine kind and git hash: what a number needs to be believed later."""
    try:
        here = Path(__file__).parent
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        git = ""
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "git": git or None,
        "mue": mue.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine,
        "threads": torch.get_num_threads(),
    }
