"""The tools that take turns, one file for each kind. `ALL` has them in the order of the tables."""

from .base import PHASES, Kit, Tool
from .borg import Borg
from .bupstash import Bupstash
from .limits import Copy, TlsLoopback, Walk
from .pipeline import Pipeline
from .restic import Restic
from .rustic import Rustic
from .strandline import Strandline

ALL: list[type[Tool]] = [Strandline, Restic, Borg, Rustic, Bupstash, Pipeline, Copy, Walk, TlsLoopback]
PEERS = ("restic", "borg", "rustic", "bupstash")
# What `--tools tar` brings along: limits rather than tools.
LIMITS = ("cp", "walk", "tls")

__all__ = ["ALL", "LIMITS", "PEERS", "PHASES", "Kit", "Tool"]
