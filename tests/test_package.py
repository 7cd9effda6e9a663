"""What a stranger meets: the README's example, the wheel in an environment of its own, and what a missing tool says."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def build_environment(**changes: str) -> dict[str, str]:
    """The environment of a build with the tools beside this Python."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **changes}


def readme_example() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)


def test_readme_example_runs():
    names: dict = {}
    exec(compile(readme_example(), "README.md", "exec"), names)
    assert names["o"].shape == names["v"].shape and names["y"].isfinite().all()


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    for what in re.findall(r"python3 dev\.py (\w+)", readme):
        assert f'"{what}"' in (ROOT / "dev.py").read_text(), what
    for command in re.findall(r"^jetkernels (\w+)", readme, re.MULTILINE):
        assert (ROOT / "jetkernels" / "cli" / f"{command}.py").exists(), command


def test_wheel_works_in_a_fresh_environment(tmp_path):
    """Built without CUDA, so that this build is tested too; installed with its dependencies and used from elsewhere."""
    # The environment may be without pip (dev.py makes it so); the Python it stands on has one.
    has_pip = run([sys.executable, "-m", "pip", "--version"]).returncode == 0
    pip = [sys.executable if has_pip else sys._base_executable, "-m", "pip"]
    built = run(
        [*pip, "--python", sys.executable, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, ROOT],
        env=build_environment(JETKERNELS_BUILD="cpu"),
    )
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("jetkernels-*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    installed = run([*pip, "--python", python, "install", "--no-compile", "-c", ROOT / "requirements.txt", wheel])
    assert installed.returncode == 0, installed.stderr[-3000:]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    example = readme_example() + "\nimport jetkernels; print(jetkernels.__file__)"
    used = run([python, "-c", example], cwd=tmp_path, env=clean)
    assert used.returncode == 0, used.stderr[-3000:]
    assert used.stdout.strip().startswith(str(tmp_path / "env"))
    info = run([tmp_path / "env" / "bin" / "jetkernels", "info"], cwd=tmp_path, env=clean)
    assert info.returncode == 0 and "built without nvcc" in info.stdout


def test_missing_compiler_says_what_to_install():
    result = run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=build_environment(CXX="no-such-compiler"))
    assert result.returncode != 0
    assert "needs a C++17 compiler: install g++" in result.stderr


def test_missing_nvcc_is_an_error_only_where_cuda_is_asked_for(tmp_path):
    def configure(build):
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DNVCC=/nowhere/nvcc", f"-DJETKERNELS_BUILD={build}"]
        return run(["cmake", "-S", ROOT, "-B", tmp_path / build, "-G", "Ninja", *options], env=build_environment())

    asked = configure("cuda")
    assert asked.returncode != 0
    assert "JETKERNELS_BUILD=cuda needs nvcc: install the CUDA toolkit" in " ".join(asked.stderr.split())
    left_to_us = configure("auto")
    assert left_to_us.returncode == 0 and "CPU library only" in left_to_us.stdout
