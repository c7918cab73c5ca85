"""Ships ``configs/`` and the scripts of ``launch/`` inside the package; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {"configs": "megatron_depthattn/configs", "launch": "megatron_depthattn/launch/scripts"}


class BuildWithShippedFiles(build_py):
    """An editable install finds them in the checkout."""

    def run(self) -> None:
        super().run()
        for source, target in SHIPPED.items():
            if not self.editable_mode:
                shutil.copytree(source, Path(self.build_lib, target), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShippedFiles})
