"""Puts what the commands read of the checkout into the wheel, as vzip/_checkout; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# MANIFEST.in puts the same into the source distribution.
FOLDERS = ("configs", "data_manifests")
FILES = ("eval.py", "train.py")


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the modules stay in the checkout, beside all of this
            return
        target = Path(self.build_lib, "vzip", "_checkout")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for name in FOLDERS:
            shutil.copytree(name, target / name)
        for name in FILES:
            shutil.copy2(name, target / name)


setup(cmdclass={"build_py": BuildPy})
