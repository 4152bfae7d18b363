"""What a wheel holds beside the packages: migrations and samples, which a checkout keeps at its top."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {"migrations": "broker/migrations", "config": "broker/_samples"}


class BuildWithData(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout is read where it stands
            return
        for source, target in SHIPPED.items():
            built = Path(self.build_lib, target)
            # A revision that was deleted since the last build would still be run.
            shutil.rmtree(built, ignore_errors=True)
            shutil.copytree(source, built, ignore=shutil.ignore_patterns("__pycache__", ".*"))


setup(cmdclass={"build_py": BuildWithData})
