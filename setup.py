"""Builds the optional native CPU library; everything static is in pyproject.toml.

``INSVP_FAST_NATIVE=1`` requires the library, ``0`` forbids it; by default it is built where a compiler is found.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libinsvp_fast_cpu"
HOME = "insvp_fast.runtime.native"  # the package that loads it
IN_PLACE = ROOT.joinpath(*HOME.split("."), f"{LIBRARY}.so")
MODES = {"": "auto", "auto": "auto", "1": "require", "0": "forbid"}

mode = MODES.get(os.environ.get("INSVP_FAST_NATIVE", "").lower())
if mode is None:
    sys.exit("INSVP_FAST_NATIVE must be 1 (require), 0 (forbid) or auto")
compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
native = mode == "require" or (mode == "auto" and compiler is not None)


class CMakeBuild(build_ext):
    """Builds the library with CMake and puts it beside the Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        """Plain ``.so``: the library is no extension module and serves every Python version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Builds the library, or goes on without one unless it is required."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._cmake(target)
        except Exception as error:
            target.unlink(missing_ok=True)
            if self.editable_mode:
                IN_PLACE.unlink(missing_ok=True)  # an older library would go on being used
            if mode == "require":
                raise
            print(f"*** insvp_fast: native CPU kernels NOT built: {error}", file=sys.stderr)

    def _cmake(self, target: Path) -> None:
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if compiler is None or cmake is None:
            raise RuntimeError("no C++ compiler found" if compiler is None else "cmake not found")
        work = ROOT / "build" / "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(work), "-DCMAKE_BUILD_TYPE=Release"]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        stamp = work / "compiler.txt"  # CMake keeps to the one that it began with
        if not (stamp.exists() and stamp.read_text() == compiler):
            shutil.rmtree(work, ignore_errors=True)
        environment = {**os.environ, "CXX": compiler}
        # pip fetches CMake for each build; another version than the one that began this tree may not go on with it
        if not work.exists() or subprocess.call(configure, env=environment):
            shutil.rmtree(work, ignore_errors=True)
            subprocess.check_call(configure, env=environment)
        stamp.write_text(compiler)
        subprocess.check_call([cmake, "--build", str(work), "--parallel"])
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        shutil.copy2(work / target.name, fresh)
        os.replace(fresh, target)  # whole at once: a running process may have the old library mapped


class Wheel(bdist_wheel):
    """One wheel per platform: the library is loaded with ctypes and binds to no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        """``py3-none-<platform>`` with the library, ``py3-none-any`` without."""
        library = self.get_finalized_command("build_ext").get_ext_fullpath(f"{HOME}.{LIBRARY}")
        built = self.distribution.has_ext_modules() and Path(library).exists()
        return "py3", "none", super().get_tag()[2] if built else "any"


if not native:
    IN_PLACE.unlink(missing_ok=True)  # build_ext will not run, and an editable tree must not keep an older library

kernel_packages = find_packages("kernels")
setup(
    packages=[
        *find_packages(include=["insvp_fast", "insvp_fast.*"]),
        *(f"insvp_fast.kernels.{name}" for name in kernel_packages),
    ],
    package_dir={f"insvp_fast.kernels.{name}": f"kernels/{name.replace('.', '/')}" for name in kernel_packages},
    # optional: setuptools must not copy the library of a build that was allowed to fail
    ext_modules=[Extension(f"{HOME}.{LIBRARY}", sources=[], optional=mode != "require")] if native else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    # evaluated in an isolated build only: fetched where there is a compiler but no cmake
    setup_requires=["cmake>=3.18", "ninja"] if native and compiler and not shutil.which("cmake") else [],
)
