"""Compiles the core with mypyc when a wheel is built, if asked to; without this the package is plain Python.

    HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 pip install .

That needs a C compiler and Python's headers. The sources are the same and stay in the wheel. What is compiled, and what
cannot be, stands in docs/design.md. An editable installation is not compiled, as it would not follow its sources.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileHook(BuildHookInterface[Any]):
    """Adds a shared library for each of `modules`, and one with the code of all of them, to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, before the wheel is written."""
        if version == "editable":
            return
        from mypyc.build import mypycify
        from setuptools import Distribution
        from setuptools.command.build_ext import build_ext

        self._folder = TemporaryDirectory()
        folder = Path(self._folder.name)
        sources = [str(Path("src", "messenger", f"{module}.py")) for module in self.config["modules"]]
        arguments = ["--config-file", "pyproject.toml", "--cache-dir", str(folder / "cache"), *sources]
        # More than -O1 takes twice the time and gains nothing: what is left are calls of the interpreter.
        extensions = mypycify(arguments, target_dir=str(folder / "c"), group_name="messenger", opt_level="1")
        command = build_ext(Distribution({"name": self.metadata.name, "ext_modules": extensions}))
        command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "objects")
        command.ensure_finalized()
        command.run()
        for library in (folder / "lib").rglob("*.so"):
            build_data["force_include"][str(library)] = str(library.relative_to(folder / "lib"))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled: it is in the wheel now."""
        if version != "editable":
            self._folder.cleanup()
