"""The wheel carries the workflow too, as `gdlib/_workflow`; a clone, and an editable install of it,
have it beside the package, which is its one place. All else is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

WORKFLOW = ("Snakefile", "config.yaml", "config", "envs", "profiles", "workflow")


class WithWorkflow(build_py):
    """Copies the workflow into what becomes the wheel."""

    def run(self) -> None:
        """Build as always, and add the workflow unless the package is used where it is."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "gdlib", "_workflow")
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for part in map(Path, WORKFLOW):
            (shutil.copytree if part.is_dir() else shutil.copy)(part, target / part)


setup(cmdclass={"build_py": WithWorkflow})
