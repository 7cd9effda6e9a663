"""A thin shim: CMakeLists.txt owns the build, this file only calls it and tells setuptools where the results are."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        sys.exit(f"jetkernels needs {name} to build: pip install {name}")
    return path


class CleanBuild(build):
    """Starts from an empty folder, so that no file of an earlier build gets into a wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds and installs the op library and the introspection module into the package folder."""

    def run(self) -> None:
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            sys.exit("jetkernels needs a C++17 compiler: install g++ (Debian: apt-get install g++) or set CXX")
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "jetkernels" if in_place else Path(self.build_lib).resolve() / "jetkernels"
        choice = os.environ.get("JETKERNELS_BUILD", "auto")
        build_folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{choice}"
        configure = [tool("cmake"), "-S", ROOT, "-B", build_folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
                     f"-DPython_EXECUTABLE={sys.executable}", f"-DJETKERNELS_BUILD={choice}"]
        for command in (configure, [tool("cmake"), "--build", build_folder], [tool("cmake"), "--install", build_folder, "--prefix", package]):
            if subprocess.run([str(part) for part in command]).returncode != 0:
                sys.exit("jetkernels: the build stopped; the sentence above says why")

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "jetkernels"
        return [str(package / name) for name in ("libjetkernels.so", self.get_ext_filename("_introspection"), "ptxas_report.txt")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(ext_modules=[Extension("jetkernels._introspection", sources=[])], cmdclass={"build": CleanBuild, "build_ext": CMakeBuild})
