"""What happens when: corpus by corpus, mode by mode, round by round, and within a round phase by phase, every tool in
turn. So whatever changes on the machine in the course of a run changes for all of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import corpora, measuring, quiet, trees
from .corpora import Corpus
from .place import Place
from .shell import Failed, say
from .tools.base import CHANGED, FIRST, ONE_FILE, PHASES, RESTORE, UNCHANGED, Kit, Tool

MIB = 1 << 20
# File caches do not trust what changed within two seconds before a backup.
SETTLE_S = 3
# Of the bytes of a corpus, what the repository of one tool and the small files that it restored take at most, on average.
ROOM_PER_TOOL = 0.8
TOUCHED_FOR_SMALL_STEPS_BYTES = 512 * MIB


@dataclass
class Round:
    """One round of one corpus in one mode: a fresh copy of the corpus, and fresh repositories."""

    place: Place
    attic: quiet.Attic
    kit: Kit
    corpus: Corpus
    mode: str
    number: int
    record: Callable[[dict], None]

    def run(self, tools: list[type[Tool]]) -> None:
        self.home = self.place.rounds / f"{self.corpus.name}-{self.mode}-{self.number}"
        self.attic.take(self.home)
        self.home.mkdir()
        original = self.place.corpora / self.corpus.name
        self.source = self.home / "source" / self.corpus.name
        self.bytes, _ = measuring.size(original)
        self.entries = sum(1 for _ in original.rglob("*"))
        self.attic.make_room(round(self.bytes * (2 + ROOM_PER_TOOL * len(tools))), self.entries * (len(tools) + 1))
        quiet.copy_tree(original, self.source)
        quiet.settle(SETTLE_S)
        self.tools: list[Tool] = []
        try:
            for kind in tools:
                self._set_up(kind)
            self._phase(FIRST)
            self._phase(UNCHANGED)
            said = self.corpus.change(self.source, corpora.random_of(self.corpus, f"change {self.number}"))
            say(f"  changed: {said}")
            quiet.settle(SETTLE_S)
            self._phase(CHANGED)
            self.expected = trees.fingerprint(self.source)
            self._phase(RESTORE)
            if self.corpus.is_tree:
                self.one_file = self._choose_file()
                self._phase(ONE_FILE)
        finally:
            for tool in self.tools:
                tool.teardown()
        self.attic.take(self.home)

    def _set_up(self, kind: type[Tool]) -> None:
        tool = kind(self.kit, self.home / kind.name, self.mode)
        try:
            tool.setup(self.source)
            self.tools.append(tool)
        except Failed as error:
            tool.teardown()
            self._failed(tool, "setup", str(error))

    def _phase(self, phase: str) -> None:
        # Another tool begins in every phase and round.
        turn = (self.number + PHASES.index(phase)) % max(1, len(self.tools))
        for tool in self.tools[turn:] + self.tools[:turn]:
            if phase not in tool.phases:
                continue
            try:
                self._step(tool, phase)
            except (Failed, OSError) as error:
                self._failed(tool, phase, str(error))

    def _failed(self, tool: Tool, phase: str, reason: str) -> None:
        """Records it; a tool that cannot save has nothing more to do in this round."""
        say(f"  {tool.name}, {phase}: FAILED: {reason}")
        self.record(self._row(tool, phase) | {"failure": reason})
        if tool in self.tools and phase in (FIRST, UNCHANGED, CHANGED):
            tool.phases = ()

    def _row(self, tool: Tool, phase: str) -> dict:
        return {"corpus": self.corpus.name, "mode": self.mode, "round": self.number, "phase": phase, "tool": tool.name}

    def _step(self, tool: Tool, phase: str) -> None:
        restoring = phase in (RESTORE, ONE_FILE)
        target = self.home / "restored" / f"{tool.name}-{phase.replace(' ', '-')}"
        if restoring:
            target.mkdir(parents=True)
        command = self._command(tool, phase, target)
        quiet.flush(tool.repository, self.place.work)
        heavy = phase in (FIRST, RESTORE)
        read = [self.source] + [tool.repository] * (restoring and tool.repository is not None)
        quiet.warm(self.kit.get("walk"), read, self.bytes + 1024 * MIB if heavy else TOUCHED_FOR_SMALL_STEPS_BYTES)
        log = self.place.logs / f"{self.corpus.name}-{self.mode}-{self.number}-{tool.name}-{phase.replace(' ', '-')}.log"
        cost, failure = measuring.measure(command, self.place, log)
        if cost is None:
            raise Failed(failure or "failed")
        left_undone_s = quiet.flush(tool.repository, self.place.work)
        if restoring:
            failure = failure or self._compare(tool, phase, target)
            self.attic.take(target)
        allocated, apparent = measuring.size(tool.repository)
        row = self._row(tool, phase) | cost.fields()
        row |= {"flush_s": round(left_undone_s, 3), "repository_bytes": allocated, "repository_apparent_bytes": apparent}
        row["failure"] = failure
        self.record(row)
        remark = f"  FAILED: {failure}" if failure else ""
        say(f"  {phase:9} {tool.name:10} {cost.wall_s:7.2f} s  {allocated / 1e6:8.1f} MB{remark}")

    def _command(self, tool: Tool, phase: str, target: Path) -> measuring.Command:
        if phase == RESTORE:
            return tool.restore(self.source, target)
        if phase == ONE_FILE:
            return tool.restore_one(self.source, self.one_file, target)
        return tool.backup(self.source)

    def _compare(self, tool: Tool, phase: str, target: Path) -> str | None:
        if phase == RESTORE:
            restored = trees.fingerprint(tool.restored(self.source, target))
            return trees.difference(self.expected, restored, tool.mtime_unit_ns)
        restored = tool.restored_one(self.one_file, target)
        if restored is None:
            return "the file was not restored"
        same = restored.read_bytes() == (self.source / self.one_file).read_bytes()
        return None if same else "the restored file differs"

    def _choose_file(self) -> str:
        """A file of middling size, the same for every tool."""
        sizes = {path: entry.size for path, entry in self.expected.items() if 2_000 <= entry.size <= 1_000_000}
        return random.Random(self.number).choice(sorted(sizes))


def run(place: Place, kit: Kit, chosen: list[Corpus], modes: list[str], rounds: int, tools: list[type[Tool]],
        results) -> None:
    """Measures everything; results are kept after every step."""
    attic = quiet.Attic(place)
    attic.clear()
    for corpus in chosen:
        try:
            made = corpora.ensure(corpus, place)
        except (Failed, OSError) as error:
            say(f"corpus {corpus.name} cannot be made: {error}")
            results.note(f"corpus {corpus.name}", str(error))
            continue
        results.note(f"corpus {corpus.name}", None)
        results.describe_corpus(corpus, made)
        for mode in modes:
            results.begin(corpus.name, mode)
            takes_part = [kind for kind in tools if kind.applies(corpus.name) and not kind.unavailable(kit, mode)]
            results.note(f"{corpus.name}, {mode}", None)
            try:
                for number in range(1, rounds + 1):
                    say(f"{corpus.name}, {mode}, round {number} of {rounds}")
                    attic.rest()
                    Round(place, attic, kit, corpus, mode, number, results.add).run(takes_part)
            except (Failed, OSError) as error:
                say(f"{corpus.name}, {mode}: ended early: {error}")
                results.note(f"{corpus.name}, {mode}", f"ended early: {error}")
            attic.clear()
