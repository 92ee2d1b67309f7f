"""Commands that are killed at random moments of their work, what is seen then, and what running them again gives."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hub_server import HubServer
from hub_server.storage import git_sha1
from trust.forks import Ended, Forks
from trust.materials import Materials

REPO = "alice/release"
RUNS_THAT_TELL = 3
KILLS_PER_MEASUREMENT = 8
MOST_TRIES = 3
"""Kills at most, for each that is to come before the end."""

Content = dict[str, str]
"""SHA-256 of each file of a folder, by path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kill:
    """One kill and what became of it."""

    after: float
    """Seconds of work."""
    landed: bool
    """Whether the command was still at work."""
    seen: str
    """What others saw then: `before` (what was there, if anything), `after` (all of the result), or `part`."""
    same: bool
    """Whether running it again gave what a run without a kill gives."""
    left: tuple[str, ...]
    """Names of what should not lie around after the second run."""
    sent: float = 0.0
    """Bytes of content that both runs sent, in parts of those of a run without a kill."""
    sent_again: tuple[str, ...] = ()
    """Contents that the Hub held when the kill came and that were sent once more."""


def content_of(folder: Path) -> Content:
    """Hash every file of a folder; none, if there is no folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Moments:
    """Random moments in the work of a command: as many as are needed for so many kills that come before its end.

    How long the work takes depends on what else the machine does, so it is measured again and again.

    Args:
        name: What is killed; equal names choose equal shares of the work.
        wanted: Kills that come before the end.
        run: Runs the command undisturbed.
    """

    def __init__(self, name: str, wanted: int, run: Callable[[], Ended]) -> None:
        self._random = random.Random(name)
        self._wanted = wanted
        self._run = run
        self._spans: deque[float] = deque(maxlen=RUNS_THAT_TELL)
        for _ in range(RUNS_THAT_TELL):
            self._measure()

    def _measure(self) -> None:
        ended = self._run()
        assert ended.status == 0, ended
        self._spans.append(ended.seconds)

    def kills(self, kill: Callable[[bool, float], Kill]) -> list[Kill]:
        """Kill at one moment after the other.

        Args:
            kill: Does it, given whether a result is to be replaced (in turn) and the moment in seconds.
        """
        kills: list[Kill] = []
        while sum(one.landed for one in kills) < self._wanted and len(kills) < MOST_TRIES * self._wanted:
            after = self._random.random() * statistics.median(self._spans)
            kills.append(kill(len(kills) % 2 == 1, after))
            if len(kills) % KILLS_PER_MEASUREMENT == 0:
                self._measure()
        return kills


def kill_writers(forks: Forks, materials: Materials, name: str, folder: Path, *, count: int) -> list[Kill]:
    """Kill a command that writes a folder, in turn one where there was nothing and one that is to be replaced."""
    old, out = materials.old, folder / "out"

    def run(*options: str, kill_after: float | None = None) -> Ended:
        return forks.run(*materials.writer(name, out, *options), kill_after=kill_after)

    moments = Moments(name, count, lambda: run("--overwrite"))
    whole, before = content_of(out), content_of(old)
    assert whole != before

    def kill(replaces: bool, after: float) -> Kill:
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        if replaces:
            shutil.copytree(old, out)
        options = ("--overwrite",) if replaces else ()
        killed = run(*options, kill_after=after)
        found = content_of(out)
        seen = "after" if found == whole else "before" if found == (before if replaces else {}) else "part"
        again = run(*options)
        if seen == "after" and not replaces:  # what is complete is not replaced unasked
            assert again.status == 2, again
            assert content_of(out) == whole
            again = run("--overwrite")
        return Kill(
            after=after,
            landed=killed.was_killed,
            seen=seen,
            same=again.status == 0 and content_of(out) == whole,
            left=tuple(sorted(path.name for path in out.parent.iterdir() if path != out)),
        )

    return moments.kills(kill)


class HubLane:
    """A Hub and a client of it that is killed: by LFS or by xet."""

    def __init__(self, folder: Path, *, xet: bool) -> None:
        self.folder, self.home, self.xet = folder, folder / "home", xet
        self._port = 0
        self._servers = 0

    @contextmanager
    def server(self) -> Iterator[HubServer]:
        """Open a Hub that holds nothing, always under the same address: clients read it when they are imported."""
        self._servers += 1
        shutil.rmtree(self.home, ignore_errors=True)
        folder = self.folder / f"hub-{self._servers}"
        with HubServer(folder, port=self._port) as hub:
            self._port = int(hub.url.rpartition(":")[2])
            yield hub
        shutil.rmtree(folder)

    def environment(self) -> dict[str, str]:
        """Return the environment of clients."""
        with self.server() as hub:
            chunks = {"HF_XET_CHUNK_CACHE_SIZE_BYTES": "0"}  # else a second download would not ask the server
            return hub.environment(self.home, xet=self.xet, **chunks)

    def kill_pushes(self, forks: Forks, release: Path, old: Path, *, count: int) -> list[Kill]:
        """Kill pushes, in turn into a repository that does not exist and into one that holds an older release."""
        command = ("push", release, REPO, "--public", "--license", "mit", "--tag", "v1")
        whole: dict[bool, tuple[Content, int]] = {}

        def undisturbed(is_update: bool) -> Ended:
            with self.server() as hub:
                if is_update:
                    hub.add_repo(REPO, old)
                ended = forks.run(*command)
                whole[is_update] = (_tree(hub), hub.content_received)
                return ended

        assert undisturbed(True).status == 0
        moments = Moments(f"push {self.xet}", count, lambda: undisturbed(False))

        def kill(replaces: bool, after: float) -> Kill:
            with self.server() as hub:
                if replaces:
                    hub.add_repo(REPO, old)
                before = _states(hub) if replaces else []
                return self._kill_push(forks, hub, command, before, *whole[replaces], after)

        return moments.kills(kill)

    def _kill_push(
        self,
        forks: Forks,
        hub: HubServer,
        command: tuple[str | Path, ...],
        before: list[Content],
        expected: Content,
        expected_bytes: int,
        after: float,
    ) -> Kill:
        killed = forks.run(*command, kill_after=after)
        held = {digest for digest in expected.values() if hub.lfs_size(digest) is not None}
        begin = len(hub.requests)
        seen = _seen(hub, before, expected)
        again = forks.run(*command)
        resent = [re.match(r"PUT /put/([0-9a-f]{64})", request.line) for request in hub.requests[begin:]]
        repo = hub.repo(REPO)
        commits = len(before) or 1  # a new repository begins with a commit of its own
        same = (
            again.status == 0
            and _tree(hub) == expected
            and _seen(hub, before, expected) == "after"
            and len(repo.history("main")) == commits + 1
            and repo.tags.get("v1") == repo.refs["main"]
            and not repo.private
        )
        return Kill(
            after=after,
            landed=killed.was_killed,
            seen=seen,
            same=same,
            left=tuple(sorted(set(repo.branches) - {"main"})),
            sent=hub.content_received / expected_bytes,
            sent_again=tuple(sorted(held & {match[1] for match in resent if match})),
        )

    def kill_pulls(self, forks: Forks, release: Path, *, count: int) -> list[Kill]:
        """Kill pulls into an empty cache."""
        with self.server() as hub:
            pushed = forks.run("push", release, REPO, "--public", "--license", "mit")
            assert pushed.status == 0, pushed
            snapshot = (
                self.home / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / hub.repo(REPO).refs["main"]
            )

            def undisturbed() -> Ended:
                shutil.rmtree(self.home)
                return forks.run("pull", REPO)

            moments = Moments(f"pull {self.xet}", count, undisturbed)
            whole = content_of(snapshot)
            assert whole == {name: digest for name, digest in content_of(release).items() if "/" not in name}
            return moments.kills(lambda _, after: self._kill_pull(forks, snapshot, whole, after))

    def _kill_pull(self, forks: Forks, snapshot: Path, whole: Content, after: float) -> Kill:
        shutil.rmtree(self.home)
        killed = forks.run("pull", REPO, kill_after=after)
        found = content_of(snapshot)
        seen = "after" if found == whole else "before" if found.items() <= whole.items() else "part"
        again = forks.run("pull", REPO)
        cache = snapshot.parents[1]
        return Kill(
            after=after,
            landed=killed.was_killed,
            seen=seen,
            same=again.status == 0 and content_of(snapshot) == whole,
            left=tuple(sorted(path.suffix for path in cache.rglob("*.incomplete"))),
        )


def _tree(hub: HubServer) -> Content:
    """Read back every file of `main`; what LFS keeps is named by SHA-256, the rest as git does."""
    repo = hub.repo(REPO)
    tree = repo.tree()
    return {
        name: git_sha1(data) if tree[name].sha256 is None else hashlib.sha256(data).hexdigest()
        for name, data in repo.files().items()
    }


def _states(hub: HubServer) -> list[Content]:
    """Return what `main` held after each commit as its entries say, the newest first."""
    history = hub.repo(REPO).history("main")
    return [{name: entry.digest for name, entry in commit.tree.items()} for commit in history]


def _seen(hub: HubServer, before: list[Content], expected: Content) -> str:
    """Look at every state that `main` has had, since a reader could have come at any time."""
    repo = hub.repos.get(("models", REPO))
    states = [] if repo is None else _states(hub)
    if not before:
        states = [state for state in states if set(state) != {".gitattributes"}]  # the first commit of every repository
    new = states[: len(states) - len(before)]
    shown_early = repo is not None and not before and not new and not repo.private
    if shown_early or any(state != expected for state in new):
        return "part"
    return "after" if new else "before"
