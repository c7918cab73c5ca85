"""A virtual environment with chosen packages alone, to see what a folder needs where the project is not."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.e2e.commands import must_succeed, python


@dataclass(frozen=True)
class CleanEnvironment:
    folder: Path

    @classmethod
    def build(cls, folder: Path, *linked: str, installed: str = "") -> CleanEnvironment:
        """Install ``installed`` from the index; take ``linked`` from the environment of the caller."""
        must_succeed(python("-m", "venv", "--without-pip", folder))
        environment = cls(folder)
        if installed:
            environment._install(installed)
        for name in linked:  # last: pip must never remove a file through a link
            environment._link(name)
        return environment

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def _install(self, requirement: str) -> None:
        pip = ("-m", "pip", "--python", self.python, "--disable-pip-version-check")
        must_succeed(python(*pip, "install", "--quiet", "--no-compile", requirement, seconds=240))

    def _link(self, distribution_name: str) -> None:
        """Link the top-level files and folders of a distribution and all that it requires, but for what is there."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = self.folder / "lib" / version / "site-packages"
        installed = {_normalised(d.name) for d in Distribution.discover(path=[str(packages)])}
        for name, package in required_distributions(distribution_name):
            if name in installed:
                continue
            tops = {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}
            for top in tops:
                source, link = Path(str(package.locate_file(top))).resolve(), packages / top
                if link.is_symlink() and link.resolve() == source:
                    continue  # a folder of several distributions, such as nvidia's
                assert not link.exists(), f"{link} is another package's"
                link.symlink_to(source)


def required_distributions(name: str) -> Iterator[tuple[str, Distribution]]:
    """The installed distribution ``name`` and, through all levels, those that it requires, by normalised name."""
    todo, seen = [Requirement(name)], set()
    while todo:
        requirement = todo.pop()
        key = (_normalised(requirement.name), *sorted(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue  # the caller lives without it as well
        yield key[0], package
        for line in package.requires or []:
            required = Requirement(line)
            extras = ("", *requirement.extras)
            if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(required)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
