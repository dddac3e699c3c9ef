"""The other side of a network step: processes whose cost is counted apart from the client's.

While it is another tool's turn, a server is stopped (SIGSTOP): whatever it does by itself takes nothing from others.
"""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from .shell import Failed, end_group, wait_for_port

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PATIENCE_S = 60


class Server:
    """No server at all: what local repositories have."""

    def begin(self) -> None:
        """Called right before the client starts."""

    def until_durable(self) -> str | None:
        """Waits, timed, for work without which the step is not done; what went wrong."""
        return None

    def end(self) -> tuple[float | None, float | None]:
        """CPU seconds since `begin`, and peak MiB."""
        return None, None

    def stop(self) -> None:
        """Ends it."""


class Daemon(Server):
    """A program that serves many commands."""

    def __init__(self, argv: list, port: int, log: Path, environment: dict):
        self.port = port
        self.log = log.open("a")
        self.process = subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=self.log,
                                        stderr=self.log, env=environment, start_new_session=True)
        self.cpu_before_s = 0.0
        try:
            wait_for_port(port, self.process)
        except Failed as error:
            self.stop()
            said = log.read_text(errors="replace").strip().splitlines()[-2:]
            raise Failed(f"{error}: {' | '.join(said)}") from error

    def begin(self) -> None:
        if self.process.poll() is not None:
            raise Failed(f"the server ended with {self.process.returncode}")
        self.process.send_signal(signal.SIGCONT)
        # Documented in proc(5): 5 resets the peak of resident memory.
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        self.cpu_before_s = self._cpu_s()

    def end(self) -> tuple[float | None, float | None]:
        if self.process.poll() is not None:
            raise Failed(f"the server ended with {self.process.returncode}")
        cost = self._cpu_s() - self.cpu_before_s, self._peak_mib()
        self.pause()
        return cost

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()

    def _cpu_s(self) -> float:
        """User and system time of the process and of its children that have ended."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_S

    def _peak_mib(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return 0.0


class Sshd(Daemon):
    """An own ssh daemon on loopback. Each command has a process that ends with it; `usage` is where it says its peak."""

    def __init__(self, argv: list, port: int, log: Path, environment: dict, usage: Path):
        super().__init__(argv, port, log, environment)
        self.usage = usage

    def begin(self) -> None:
        super().begin()
        self.usage.unlink(missing_ok=True)

    def end(self) -> tuple[float | None, float | None]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        end = time.monotonic() + PATIENCE_S
        while children.read_text().strip() and time.monotonic() < end:
            time.sleep(0.02)
        cpu_s, peak_mib = super().end()
        lines = self.usage.read_text().splitlines() if self.usage.exists() else []
        return cpu_s, max([peak_mib or 0.0] + [json.loads(line)["peak_kib"] / 1024 for line in lines])


class OneShot(Server):
    """A pipeline that serves one command and ends with it; the command is done when this is."""

    def __init__(self, measure: Path, argv: list, port: int, usage: Path, environment: dict):
        self.measure, self.argv, self.port, self.usage, self.environment = measure, argv, port, usage, environment
        self.process: subprocess.Popen | None = None

    def begin(self) -> None:
        self.usage.unlink(missing_ok=True)
        argv = [str(word) for word in [self.measure, self.usage, *self.argv]]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, env=self.environment, start_new_session=True)
        wait_for_port(self.port, self.process)

    def until_durable(self) -> str | None:
        try:
            code = self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            end_group(self.process)
            return "the other side does not end"
        return f"the other side ended with {code}" if code else None

    def end(self) -> tuple[float | None, float | None]:
        if not self.usage.exists():
            return None, None
        used = json.loads(self.usage.read_text().splitlines()[-1])
        return used["user_s"] + used["system_s"], used["peak_kib"] / 1024

    def stop(self) -> None:
        if self.process is not None:
            end_group(self.process)
