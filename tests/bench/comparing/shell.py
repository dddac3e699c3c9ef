"""Programs that are run but not measured, and where they are found."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Failed(Exception):
    """A step that could not be done; the text is for people."""


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def run(argv, **options) -> str:
    """Runs a command that must succeed; its standard output."""
    argv = [str(word) for word in argv]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", **options)
    except OSError as error:
        raise Failed(f"{argv[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise Failed(f"{' '.join(argv[:4])} … ended with {done.returncode}: {tail(done.stderr or done.stdout)}")
    return done.stdout


def tail(text: str, lines: int = 4) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-lines:])


def end_group(process: subprocess.Popen) -> None:
    """Kills a process that was started in a session of its own, with everything it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def find(name: str) -> Path | None:
    """A program, also where only administrators look."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")
    return Path(found) if found else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen, patience_s: float = 30) -> None:
    """Waits until somebody listens on a port of 127.0.0.1, without connecting to it: a receiver takes only one guest."""
    end = time.monotonic() + patience_s
    wanted = f":{port:04X}"
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Failed(f"{Path(process.args[0]).name} ended with {process.returncode} before it listened")
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(wanted) and fields[3] == "0A":
                return
        time.sleep(0.005)
    raise Failed(f"nobody listens on port {port} after {patience_s:.0f} s")
