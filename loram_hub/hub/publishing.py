"""Put a set of files on the Hub so that a reader sees all of it or nothing.

Phase one: a repository that starts private (one that exists is hidden or gated first, if it is to be in the end), and a
branch aside, to which the files are uploaded. What the Hub then holds is compared, hash by hash, with what was to be
uploaded. Phase two: one commit to `main`, the tag, and only then more visibility.

Every step first looks at what is there. So a step can be repeated when its answer is lost, a push that was cut off at
any point is completed by running it again, and neither uploads what the Hub has already nor commits anything twice.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    RepoFile,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from loram_hub.digests import git_sha1_of
from loram_hub.errors import AccessError, VerificationError
from loram_hub.hub.access import access_errors, clean_token, persistently, status_of
from loram_hub.licences import declared_licence

logger = logging.getLogger(__name__)

Gate = Literal["auto", "manual", False]
"""How access is granted: to whoever accepts the terms, by hand, or not gated."""

SIDE_BRANCH = "loram-push-"
_NEW_BRANCH = "loram-push-new-"
"""In a repository that the push created: until the end, so that whoever completes it knows."""
_ABANDONED = timedelta(days=7)
_ALONE_FROM = 64 * 1024 * 1024
"""Files from this size on are committed one by one to the branch aside: what is committed is never sent again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UploadFile:
    """A file as it is to be on the Hub."""

    name: str
    """Path in the repository."""
    content: Path | bytes
    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits."""

    def is_stored_as(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub holds this content: by SHA-256 where it is kept in LFS, else by git's blob id."""
        if remote is None or remote.size != self.size:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        return remote.git_sha1 == git_sha1_of(self.content)


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file as the Hub describes it."""

    size: int
    """Bytes."""
    sha256: str | None
    """Of a file in LFS."""
    git_sha1: str
    """Git's id of the blob; for a file in LFS that of the pointer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteRepository:
    """What the Hub has under a repository's name."""

    commit: str
    """Commit that was asked for, by default the head of `main`."""
    private: bool
    gated: Gate
    files: Mapping[str, RemoteFile]
    """Files at that commit, by path."""
    licence: str | None
    """What its card declares."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Commit by tag; empty if refs were not asked for."""
    branches: tuple[str, ...] = ()
    """Likewise."""

    @property
    def is_unfinished(self) -> bool:
        """Whether it was created by a push that did not come to its end."""
        return any(branch.startswith(_NEW_BRANCH) for branch in self.branches)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a push left on the Hub."""

    commit: str
    """Commit on `main` that holds the files."""
    uploaded: tuple[str, ...]
    """Files that the Hub did not hold before."""


def look_up(
    repo_id: str, *, revision: str | None = None, refs: bool = False, token: str | bool | None = None
) -> RemoteRepository | None:
    """Return what the Hub has under a name; None if there is nothing that this token may see.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; None for `main`.
        refs: also ask for branches and tags.
        token: of the Hub.

    Raises:
        AccessError: the Hub could not be reached, or refused.
    """
    api = HfApi(token=clean_token(token))
    with access_errors(repo_id):
        try:
            return persistently(lambda: _look_up(api, repo_id, revision, refs=refs))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None


def _look_up(api: HfApi, repo_id: str, revision: str | None, *, refs: bool) -> RemoteRepository:
    info: ModelInfo = api.model_info(repo_id, revision=revision, files_metadata=True)
    found = api.list_repo_refs(repo_id) if refs else None
    return RemoteRepository(
        commit=str(info.sha),
        private=bool(info.private),
        gated=_gate(info.gated),
        files={
            file.rfilename: RemoteFile(
                size=file.size or 0, sha256=file.lfs.sha256 if file.lfs else None, git_sha1=str(file.blob_id)
            )
            for file in info.siblings or ()
        },
        licence=None if info.card_data is None else declared_licence(info.card_data.to_dict()),
        tags={} if found is None else {tag.name: tag.target_commit for tag in found.tags},
        branches=() if found is None else tuple(branch.name for branch in found.branches),
    )


def why_not_writable(repo_id: str, *, token: str | bool | None = None) -> str | None:
    """Say why this token may not write to a repository, as far as the Hub tells beforehand; None if nothing is known.

    Raises:
        AccessError: the Hub could not be reached.
    """
    api = HfApi(token=clean_token(token))
    with access_errors(repo_id):
        try:
            who = persistently(api.whoami)
        except LocalTokenNotFoundError:
            return "you are not logged in: 'hf auth login', or pass token=..."
        except HfHubHTTPError as err:
            if status_of(err) != 401:
                raise
            return "the Hub does not know this token"
    namespace = repo_id.split("/")[0]
    if namespace not in {who.get("name"), *(organization.get("name") for organization in who.get("orgs") or ())}:
        return f"{who.get('name')} is no member of {namespace}"
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    return "this token may only read" if role == "read" else None


def _gate(value: object) -> Gate:
    return "auto" if value == "auto" else "manual" if value == "manual" else False


def _tree(api: HfApi, repo_id: str, revision: str) -> dict[str, RemoteFile]:
    return {
        entry.path: RemoteFile(size=entry.size, sha256=entry.lfs.sha256 if entry.lfs else None, git_sha1=entry.blob_id)
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=revision)
        if isinstance(entry, RepoFile)
    }


def publish_files(
    files: Sequence[UploadFile],
    repo_id: str,
    *,
    message: str,
    private: bool,
    gated: Gate,
    seen: RemoteRepository | None,
    delete: Collection[str] = (),
    tag: str | None = None,
    collection: str | None = None,
    token: str | bool | None = None,
) -> Published:
    """Publish files in two phases; see the module's text.

    Args:
        files: what the repository is to hold.
        repo_id: `org/name`.
        message: title of the commit on `main`.
        private: visibility in the end.
        gated: gating in the end.
        seen: the repository as `look_up` with `refs` found it, None if there was none. A commit that somebody else
            makes after that is not overwritten.
        delete: files on `main` that go.
        tag: tag to put on the commit.
        collection: slug of a collection, or the title of one in the same namespace, created if there is none.
        token: of the Hub.

    Returns:
        The commit and what was uploaded.

    Raises:
        AccessError: the Hub refused or could not be reached, or someone else committed meanwhile.
        VerificationError: what the Hub holds is not what was uploaded; `main` was not changed.
    """
    is_new = seen is None or seen.is_unfinished
    push = _Push(
        api=HfApi(token=clean_token(token)), repo_id=repo_id, files=files, delete=frozenset(delete), is_new=is_new
    )
    with access_errors(repo_id):
        if seen is None:
            persistently(push.create_repository)
        head = persistently(push.head) if seen is None else seen.commit
        persistently(lambda: push.tighten(private, gated))
        commit = persistently(push.find_published)
        if commit is None:
            side = push.upload_aside()
            commit = persistently(lambda: push.commit_to_main(side, head, message))
        push.refuse_difference(commit)
        if tag is not None:
            persistently(lambda: push.put_tag(tag, commit))
        persistently(lambda: push.set_visibility(private, gated))
    if collection is not None:
        with access_errors(f"the collection {collection}"):
            persistently(lambda: push.add_to_collection(collection))
    with access_errors(repo_id):
        persistently(push.remove_side_branches)
    return Published(commit=commit, uploaded=tuple(push.uploaded))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Push:
    """One push; each method is a step that may be repeated."""

    api: HfApi
    repo_id: str
    files: Sequence[UploadFile]
    delete: frozenset[str]
    is_new: bool
    """Whether this push, or one that it completes, created the repository."""
    uploaded: list[str] = field(default_factory=list)

    @property
    def branch(self) -> str:
        """The branch aside, named by what is pushed: the same push finds it again, another one does not."""
        listing = "".join(f"{file.sha256} {file.name}\n" for file in sorted(self.files, key=lambda file: file.name))
        prefix = _NEW_BRANCH if self.is_new else SIDE_BRANCH
        return prefix + hashlib.sha256(listing.encode()).hexdigest()[:12]

    def create_repository(self) -> None:
        """Create the repository, private, and the branch that says who did."""
        self.api.create_repo(self.repo_id, private=True, exist_ok=True)
        self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)

    def head(self, revision: str = "main") -> str:
        """Return the commit that a branch is at."""
        return str(self.api.model_info(self.repo_id, revision=revision).sha)

    def tighten(self, private: bool, gated: Gate) -> None:
        """Hide or gate before anything is uploaded what is to be hidden or gated in the end; never the reverse."""
        info = self.api.model_info(self.repo_id)
        hide = True if private and not info.private else None
        gate = gated if gated and not _gate(info.gated) else None
        if hide or gate:
            self.api.update_repo_settings(self.repo_id, private=hide, gated=gate)

    def find_published(self) -> str | None:
        """Return the head of `main` if it holds the files already, and nothing that is to go."""
        head = self.head()
        tree = _tree(self.api, self.repo_id, head)
        return head if self._is_done(tree) else None

    def upload_aside(self) -> str:
        """Bring every file onto the branch aside and compare it there; return the branch's commit."""
        persistently(lambda: self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))
        missing = persistently(lambda: self._missing(self.branch, self.files))
        with tqdm(total=sum(file.size for file in missing), desc="Pushing", unit="B", unit_scale=True) as progress:
            for group in _groups(missing):
                persistently(lambda group=group: self._commit_aside(group))  # type: ignore[misc]
                progress.update(sum(file.size for file in group))
        commit = persistently(lambda: self.head(self.branch))
        self.refuse_difference(commit)
        return commit

    def _commit_aside(self, group: Sequence[UploadFile]) -> None:
        missing = self._missing(self.branch, group)
        if not missing:
            return
        operations = [CommitOperationAdd(file.name, _for_client(file.content)) for file in missing]
        self.api.create_commit(
            self.repo_id, operations, commit_message=f"Upload {missing[0].name}", revision=self.branch
        )
        self.uploaded.extend(file.name for file in missing)

    def commit_to_main(self, side: str, parent: str, message: str) -> str:
        """Make all files visible in one commit, without sending those again that the Hub keeps in LFS."""
        head = self.head()
        tree, aside = _tree(self.api, self.repo_id, head), _tree(self.api, self.repo_id, side)
        if self._is_done(tree):  # the answer to an earlier attempt was lost, or the same push ran twice
            return head
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            CommitOperationDelete(name) for name in sorted(self.delete & set(tree))
        ]
        for file in self.files:
            if file.is_stored_as(tree.get(file.name)):
                continue
            if aside[file.name].sha256 is not None:
                operations.append(CommitOperationCopy(file.name, file.name, src_revision=side))
            else:
                operations.append(CommitOperationAdd(file.name, _for_client(file.content)))
        try:
            done = self.api.create_commit(
                self.repo_id, operations, commit_message=message, revision="main", parent_commit=parent
            )
        except HfHubHTTPError as err:
            if status_of(err) != 412:
                raise
            published = self.find_published()
            if published is not None:
                return published
            raise AccessError(
                f"Someone else committed to {self.repo_id} during the push. Look at what they did, then push again: "
                "the files are on the Hub and will not be sent again."
            ) from err
        return str(done.oid)

    def refuse_difference(self, commit: str) -> None:
        """Compare what a commit holds with what was to be uploaded."""
        wrong = persistently(lambda: self._missing(commit, self.files))
        if wrong:
            raise VerificationError(
                f"{wrong[0].name} on the Hub ({self.repo_id} at {commit[:12]}) is not what was pushed "
                f"({len(wrong)} files differ). Push again; if it stays so, delete the branch {self.branch}."
            )

    def put_tag(self, tag: str, commit: str) -> None:
        """Tag the commit."""
        if tag not in self._tags():
            self.api.create_tag(self.repo_id, tag=tag, revision=commit)

    def set_visibility(self, private: bool | None, gated: Gate | None) -> None:
        """Set both in one request, so that a gated release is never public without its gate."""
        info = self.api.model_info(self.repo_id)
        wanted_private = None if private == bool(info.private) else private
        wanted_gate = None if gated == _gate(info.gated) else gated
        if wanted_private is not None or wanted_gate is not None:
            self.api.update_repo_settings(self.repo_id, private=wanted_private, gated=wanted_gate)

    def add_to_collection(self, collection: str) -> None:
        """Add the repository to a collection."""
        slug = collection
        if "/" not in collection:
            namespace, private = self.repo_id.split("/")[0], bool(self.api.model_info(self.repo_id).private)
            slug = self.api.create_collection(collection, namespace=namespace, private=private, exists_ok=True).slug
        self.api.add_collection_item(slug, self.repo_id, "model", exists_ok=True)

    def remove_side_branches(self) -> None:
        """Remove the branch aside, and what pushes that were given up have left."""
        for branch in self.api.list_repo_refs(self.repo_id).branches:
            is_own = branch.name == self.branch or branch.name.startswith(_NEW_BRANCH)
            if is_own or (branch.name.startswith(SIDE_BRANCH) and self._is_abandoned(branch.name)):
                self.api.delete_branch(self.repo_id, branch=branch.name)

    def _is_abandoned(self, branch: str) -> bool:
        newest = self.api.list_repo_commits(self.repo_id, revision=branch)[0]
        return datetime.now(UTC) - newest.created_at > _ABANDONED

    def _tags(self) -> dict[str, str]:
        return {tag.name: tag.target_commit for tag in self.api.list_repo_refs(self.repo_id).tags}

    def _missing(self, revision: str, files: Sequence[UploadFile]) -> list[UploadFile]:
        tree = _tree(self.api, self.repo_id, revision)
        return [file for file in files if not file.is_stored_as(tree.get(file.name))]

    def _is_done(self, tree: Mapping[str, RemoteFile]) -> bool:
        holds_all = all(file.is_stored_as(tree.get(file.name)) for file in self.files)
        return holds_all and not self.delete & set(tree)


def _groups(files: Sequence[UploadFile]) -> Iterator[list[UploadFile]]:
    """Split into commits: the small files together, each large one by itself."""
    small = [file for file in files if file.size < _ALONE_FROM]
    if small:
        yield small
    for file in files:
        if file.size >= _ALONE_FROM:
            yield [file]


def _for_client(content: Path | bytes) -> str | bytes:
    return os.fspath(content) if isinstance(content, Path) else content
