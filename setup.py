"""A thin shim: CMakeLists.txt owns the build, this file only calls it and tells setuptools where the results are."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent.resolve()
CHOICES = ("auto", "cuda", "cpu")  # of JETKERNELS_BUILD, which names the build's folder


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        sys.exit(f"jetkernels needs {name} to build: pip install {name}")
    return path


def configure() -> Path:
    """Prepares the build's folder; where it cannot, ends with the sentence of CMakeLists.txt that says why."""
    if sys.platform != "linux":
        sys.exit(f"jetkernels builds on Linux, this is {sys.platform}")
    choice = os.environ.get("JETKERNELS_BUILD") or "auto"
    if choice not in CHOICES:
        sys.exit(f"JETKERNELS_BUILD must be {', '.join(CHOICES[:-1])} or {CHOICES[-1]}, got {choice!r}")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        sys.exit("jetkernels needs a C++20 compiler: install g++ (Debian: apt-get install g++) or set CXX")
    folder = ROOT / "build" / choice
    command = [tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DJETKERNELS_BUILD={choice}"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        said = re.search(r"^CMake Error at \S+ \(message\):\n((?:  .*\n)+)", done.stderr, re.MULTILINE)
        sys.exit(" ".join(said[1].split()) if said else done.stdout + done.stderr)
    print(done.stdout, end="")
    return folder


class EarlyRefusal(dist_info):
    """Says what a build would lack when pip asks for metadata, before it downloads a gigabyte of dependencies."""

    def run(self) -> None:
        configure()
        super().run()


class CleanBuild(build):
    """Starts from an empty folder, so that no file of an earlier build gets into a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds and installs the op library into the package folder."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "jetkernels" if in_place else Path(self.build_lib).resolve() / "jetkernels"
        folder = configure()
        for command in (["--build", folder], ["--install", folder, "--prefix", package]):
            if subprocess.run([tool("cmake"), *map(str, command)]).returncode != 0:
                sys.exit("jetkernels: the build stopped; what is above says why")

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "jetkernels" / name) for name in ("libjetkernels.so", "ptxas_report.txt")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class EveryPython(bdist_wheel):
    """The op library has no Python symbols: one wheel per platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("jetkernels.libjetkernels", sources=[])],
    cmdclass={"bdist_wheel": EveryPython, "build": CleanBuild, "build_ext": CMakeBuild, "dist_info": EarlyRefusal},
)
