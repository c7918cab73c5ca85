"""Paths that a user types, and symbolic links in folders from elsewhere, which must not lead out of them."""

import os
from pathlib import Path


def user_path(text: str) -> Path:
    """The path that a user typed as an option; a shell leaves the `~` of `--output=~/x` as it is."""
    return Path(os.path.expanduser(text))


def link_root(folder: Path) -> Path:
    """The folder that links below `folder` must stay in: `folder` itself, with its own links resolved.

    In the Hugging Face Hub's cache every file of a snapshot is a link into the blobs of its repository
    (`models--ORG--NAME/snapshots/REVISION/FILE` to `models--ORG--NAME/blobs/HASH`), so there it is the repository.
    """
    folder = Path(os.path.realpath(folder))
    for revision in (folder, *folder.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith(("models--", "datasets--")):
            return repository
    return folder


def leads_out(path: Path, root: Path) -> bool:
    """Whether `path` is a link whose end is not below `root`, as `link_root` returns it."""
    return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root)
