"""What one step costs: wall clock, CPU seconds and peak memory of both sides, size of the repository."""

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .place import Place
from .servers import TICKS_PER_S, Server
from .shell import end_group, tail

COMMAND_S_MAX = 3600


@dataclass(frozen=True)
class Command:
    """One step of a tool."""

    argv: list
    cwd: Path | None = None
    environment: dict = field(default_factory=dict)
    server: Server | None = None


@dataclass(frozen=True)
class Cost:
    """Peaks are those of the largest process of each side; server fields are None where there is no server."""

    wall_s: float
    client_cpu_s: float
    client_peak_mib: float
    server_cpu_s: float | None
    server_peak_mib: float | None
    # Of everybody else meanwhile: the kernel's own threads, and neighbours, which there should be none of.
    others_cpu_s: float

    def fields(self) -> dict:
        return {name: value if value is None else round(value, 4) for name, value in asdict(self).items()}


def measure(command: Command, place: Place, log: Path) -> tuple[Cost | None, str | None]:
    """Runs a command; its cost, and what went wrong if anything did."""
    usage = place.rounds / "usage.jsonl"
    usage.unlink(missing_ok=True)
    argv = [place.tools / "bin/measure", usage, *command.argv]
    server = command.server or Server()
    server.begin()
    with log.open("w") as output:
        busy_before_s, begun = busy_cpu_s(), time.monotonic()
        client = subprocess.Popen([str(word) for word in argv], cwd=command.cwd, env=environment(command.environment),
                                  stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
        try:
            client.wait(COMMAND_S_MAX)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_group(client)
        failure = server.until_durable()
        wall_s = time.monotonic() - begun
        busy_s = busy_cpu_s() - busy_before_s
    server_cpu_s, server_peak_mib = server.end()
    if client.returncode != 0:
        said = tail(log.read_text(errors="replace"), 3)
        return None, f"ended with {client.returncode}: {said}"[:400]
    used = json.loads(usage.read_text().splitlines()[-1])
    cpu_s = used["user_s"] + used["system_s"]
    others_cpu_s = max(0.0, busy_s - cpu_s - (server_cpu_s or 0))
    return Cost(wall_s, cpu_s, used["peak_kib"] / 1024, server_cpu_s, server_peak_mib, others_cpu_s), failure


def busy_cpu_s() -> float:
    """What all cores have worked since the machine began, time taken by its host included."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _waiting, interrupt, soft_interrupt, stolen = ticks
    return (user + nice + system + interrupt + soft_interrupt + stolen) / TICKS_PER_S


def environment(extra: dict) -> dict:
    """A small, equal environment: no setting of the user reaches a tool."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return kept | {"LC_ALL": "C.UTF-8"} | {name: str(value) for name, value in extra.items()}


def size(root: Path | None) -> tuple[int, int]:
    """Allocated and apparent bytes of everything below a directory, directories included."""
    if root is None or not root.exists():
        return 0, 0
    allocated = apparent = 0
    seen = set()
    pending = [str(root)]
    while pending:
        path = pending.pop()
        status = os.lstat(path)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        allocated += status.st_blocks * 512
        if os.path.isdir(path) and not os.path.islink(path):
            pending.extend(entry.path for entry in os.scandir(path))
        else:
            apparent += status.st_size
    return allocated, apparent
