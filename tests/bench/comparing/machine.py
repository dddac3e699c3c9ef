"""What the numbers were measured on. Nothing here names the machine itself."""

import os
import platform
from pathlib import Path

from .shell import Failed, run


def describe(work: Path) -> dict:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory_kib = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    try:
        file_system = run(["findmnt", "-n", "-o", "FSTYPE,OPTIONS", "-T", work]).strip()
    except Failed:
        file_system = "unknown"
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / (1 << 20), 1),
        "file_system": " ".join(file_system.split()),
        "kernel": platform.release(),
        "autogroup": _autogroup(),
    }


def _autogroup() -> bool:
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    return switch.exists() and switch.read_text().strip() == "1"
