"""What was measured, as `results.json` keeps it.

A run replaces the corpora and modes that it measures and keeps the others, so that one file can be filled by several runs
on the same machine. Ratios are only ever taken within one corpus, mode and round.
"""

import json
import os
from pathlib import Path

from . import measuring
from .corpora import Corpus

VERSION = 1


class Results:
    """`rows` has one object for each step; see `Round._step` for its fields."""

    def __init__(self, path: Path, fresh: bool = True):
        self.path = path
        self.rows: list[dict] = []
        self.corpora: dict[str, dict] = {}
        # Why something was not measured, by what that is.
        self.notes: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.terms: dict[str, str] = {}
        self.machine: dict = {}
        self.quick = False
        if path.exists() and not fresh:
            self._load()

    def _load(self) -> None:
        kept = json.loads(self.path.read_text())
        if kept.get("version") != VERSION:
            return
        self.rows, self.corpora, self.notes = kept["rows"], kept["corpora"], kept["notes"]
        self.versions, self.terms, self.machine = kept["versions"], kept["terms"], kept["machine"]
        self.quick = kept["quick"]

    def describe_corpus(self, corpus: Corpus, made: Path) -> None:
        allocated, apparent = measuring.size(made)
        files = sum(len(names) for _, _, names in os.walk(made))
        self.corpora[corpus.name] = {"title": corpus.title, "files": files, "bytes": apparent, "allocated": allocated}

    def begin(self, corpus: str, mode: str) -> None:
        self.rows = [row for row in self.rows if (row["corpus"], row["mode"]) != (corpus, mode)]

    def note(self, subject: str, reason: str | None) -> None:
        """Says why `subject` was not measured; None: it was."""
        self.notes.pop(subject, None)
        if reason:
            self.notes[subject] = reason
        self.save()

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        kept = {"version": VERSION, "quick": self.quick, "machine": self.machine, "versions": self.versions, "terms": self.terms,
                "notes": self.notes, "corpora": self.corpora, "rows": self.rows}
        partial.write_text(json.dumps(kept, indent=1) + "\n")
        partial.replace(self.path)
