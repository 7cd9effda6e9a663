"""What a stranger meets: source package and wheel, an environment with PyTorch alone, and what a missing tool says."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from support.documents import blocks
from support.paths import ROOT


def run(command, **options):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def build_environment(**changes: str) -> dict[str, str]:
    """The environment of a build with the tools beside this Python."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **changes}


def readme_example() -> str:
    return blocks("README.md", "python")[0].code


def pip() -> list[str]:
    # The environment may be without pip (dev.py makes it so); the Python it stands on has one.
    has_pip = run([sys.executable, "-m", "pip", "--version"]).returncode == 0
    return [sys.executable if has_pip else sys._base_executable, "-m", "pip"]


def done(command, **options) -> subprocess.CompletedProcess:
    result = run(command, **options)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source package."""
    folder = tmp_path_factory.mktemp("sdist")
    hook = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    done([sys.executable, "-c", hook, folder], cwd=ROOT)
    (path,) = folder.glob("jetkernels-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the source package as pip does it, with isolation, and without CUDA, so that this build is tested
    too.
    """
    folder = tmp_path_factory.mktemp("wheel")
    command = [*pip(), "--python", sys.executable, "wheel", "--no-deps", "-w", folder, sdist]
    done(command, env=build_environment(JETKERNELS_BUILD="cpu"), cwd=folder)
    (path,) = folder.glob("jetkernels-*.whl")
    return path


class Fresh:
    """An environment that holds the wheel and what it depends on, nothing else."""

    def __init__(self, folder: Path, wheel: Path):
        self.folder, self.bin = folder, folder / "env" / "bin"
        venv.create(folder / "env", with_pip=False)
        command = [
            *pip(),
            "--python",
            self.bin / "python",
            "install",
            "--no-compile",
            "-c",
            ROOT / "requirements.txt",
            wheel,
        ]
        # What else lies on the path of this Python, such as the repository, pip would take for installed.
        self.variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done(command, cwd=folder, env=self.variables)

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return run([self.bin / command[0], *command[1:]], cwd=self.folder, env=self.variables)

    def says(self, *command: str) -> str:
        """The last line of what a command that must fail says."""
        result = self.run(*command)
        assert result.returncode != 0, result.stdout
        return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Fresh:
    return Fresh(tmp_path_factory.mktemp("fresh"), wheel)


def test_source_package_holds_the_repository_and_no_build(sdist):
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    tracked = (
        done(["git", "ls-files"], cwd=ROOT).stdout.split()
        if (ROOT / ".git").exists()
        else ["CMakeLists.txt", "cmake/find_cutlass.cmake"]
    )
    wanted = {name for name in tracked if not name.startswith(".")}
    assert wanted <= found, sorted(wanted - found)
    assert not [name for name in found if name.endswith((".so", ".pyc", ".o")) or name.startswith("build")]


def test_wheel_is_for_every_python_and_says_what_it_is(wheel):
    assert re.fullmatch(r"jetkernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(next(name for name in names if name.endswith("/METADATA"))))
        library = archive.read("jetkernels/libjetkernels.so")
    assert {"jetkernels/py.typed", "jetkernels/model/configs/2b.json", "jetkernels/ptxas_report.txt"} <= set(names)
    assert [name for name in names if name.endswith(".so")] == ["jetkernels/libjetkernels.so"]
    assert [name for name in names if name.endswith("/licenses/LICENSE")]
    assert all(name.startswith("jetkernels") for name in names)
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Author"] == "The jetkernels authors"
    assert "Typing :: Typed" in metadata.get_all("Classifier") and metadata["Requires-Python"] == ">=3.11"
    assert (
        metadata["Description-Content-Type"] == "text/markdown"
        and "Homepage, https://" in metadata.get_all("Project-URL")[0]
    )
    assert [need for need in metadata.get_all("Requires-Dist") if "extra" not in need] == ["torch>=2.11"]
    assert {"model", "plot", "all"} <= set(metadata.get_all("Provides-Extra"))
    assert not re.search(rb"\0_?Py[A-Z_]\w+\0", library), "the op library must not know Python"


def test_licence_is_apache():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_wheel_works_in_a_fresh_environment(fresh):
    """With PyTorch alone, from another folder."""
    example = readme_example() + "\nimport jetkernels; print(jetkernels.__file__)"
    used = fresh.run("python", "-c", example)
    assert used.returncode == 0, used.stderr[-3000:]
    assert used.stdout.strip().startswith(str(fresh.folder))
    info = fresh.run("jetkernels", "info")
    assert info.returncode == 0 and "built without nvcc" in info.stdout


USE = """
import torch
import jetkernels
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
g, beta = -torch.rand(1, 5, 2), torch.rand(1, 5, 2)
o, _ = jetkernels.chunk_gated_delta_rule(q, k, v, g, beta)
o.sum().backward()
assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v))
jet = dict(num_heads=2, head_dim=8, expand_v=1.0, conv_size=4, dconv_generator_reduction=4, norm_eps="1e-5")
config = JetNemotronConfig(vocab_size=32, hidden_size=16, intermediate_size=32, layer_types=["jet", "attn"],
    num_attention_heads=2, num_key_value_heads=1, efficient_attention_config={"jet": jet})
model = JetNemotronForCausalLM.random(config, seed=0)
print(model.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=2).shape)
"""


def test_models_with_random_weights_need_torch_alone(fresh):
    used = fresh.run("python", "-c", USE)
    assert used.returncode == 0, used.stderr[-3000:]
    assert used.stdout.strip() == "torch.Size([1, 5])"


def test_missing_extras_are_named(fresh, tmp_path):
    plots = "from jetkernels.postnas import report; report.curve('x.png', [1.0], 'title', 'label')"
    saves = f"{USE}\nmodel.save_pretrained({str(tmp_path / 'saved')!r})"
    assert "pip install 'jetkernels[model]'" in fresh.says("python", "-c", saves)
    assert "pip install 'jetkernels[model]'" in fresh.says(
        "python", "-c", "from jetkernels.model import Tokenizer; Tokenizer.byte_level()"
    )
    assert "pip install 'jetkernels[all]'" in fresh.says("python", "-c", plots)


def other_pythons() -> list[str]:
    """Interpreters of other versions that have PyTorch: JETKERNELS_OTHER_PYTHON, or what is on PATH."""
    named = os.environ.get("JETKERNELS_OTHER_PYTHON")
    names = [named] if named else [path for minor in range(11, 20) if (path := shutil.which(f"python3.{minor}"))]
    facts = "import sys, torch; print(sys.version_info[:2], torch.__version__ >= '2.11')"
    here = f"{tuple(sys.version_info[:2])}"
    found = [(name, run([name, "-c", facts]).stdout) for name in names]
    return [name for name, said in found if said.endswith("True\n") and not said.startswith(here)]


def test_wheel_works_under_another_python(wheel, tmp_path):
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python from 3.11 on with PyTorch is on PATH; JETKERNELS_OTHER_PYTHON can name one")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    for python in pythons:
        used = run([python, "-c", USE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
        assert used.returncode == 0 and used.stdout.strip() == "torch.Size([1, 5])", used.stderr[-3000:]


def test_build_without_torch_says_what_to_type(sdist, tmp_path):
    """At the metadata step, before pip downloads what the package depends on."""
    venv.create(tmp_path / "env", with_pip=False)
    command = [*pip(), "--python", tmp_path / "env" / "bin" / "python", "wheel", "-w", tmp_path, sdist]
    result = run(command, env=build_environment(JETKERNELS_BUILD="cpu"), cwd=tmp_path)
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert "type `pip install torch setuptools cmake ninja`, then `pip install --no-build-isolation .`" in said
    assert "Collecting torch" not in said and "Downloading torch" not in said and "Traceback" not in said


def test_build_refuses_a_choice_it_does_not_know(tmp_path):
    result = run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=build_environment(JETKERNELS_BUILD="cpuu")
    )
    assert result.returncode != 0 and result.stderr.strip() == "JETKERNELS_BUILD must be auto, cuda or cpu, got 'cpuu'"
    result = run(
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DJETKERNELS_BUILD=cpuu"], env=build_environment()
    )
    assert result.returncode != 0 and "JETKERNELS_BUILD must be auto, cuda or cpu, got 'cpuu'" in result.stderr


@pytest.mark.parametrize("name, value", (("BACKEND", "plan"), ("CHECK", "yes"), ("CPU_ISA", "avx5"), ("FLA", "off")))
def test_settings_of_the_library_refuse_what_they_do_not_know(name, value):
    said = run(
        [sys.executable, "-c", "import jetkernels"], cwd=ROOT, env={**os.environ, f"JETKERNELS_{name}": value}
    ).stderr
    assert re.search(
        rf"ImportError: JETKERNELS_{name} must be .* or unset, got '{value}'", said.strip().splitlines()[-1]
    )


def test_another_library_must_be_one_of_jetkernels():
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    said = run(
        [sys.executable, "-c", "import jetkernels"],
        cwd=ROOT,
        env={**os.environ, "JETKERNELS_LIBRARY": str(torch_library)},
    ).stderr
    assert "is no library of this version of jetkernels" in said.strip().splitlines()[-1]


def test_missing_compiler_says_what_to_install():
    result = run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=build_environment(CXX="no-such-compiler")
    )
    assert result.returncode != 0
    assert "needs a C++20 compiler: install g++" in result.stderr


def test_missing_nvcc_is_an_error_only_where_cuda_is_asked_for(tmp_path):
    def configure(build):
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DNVCC=/nowhere/nvcc", f"-DJETKERNELS_BUILD={build}"]
        return run(["cmake", "-S", ROOT, "-B", tmp_path / build, "-G", "Ninja", *options], env=build_environment())

    asked = configure("cuda")
    assert asked.returncode != 0
    assert "JETKERNELS_BUILD=cuda needs nvcc: install the CUDA toolkit" in " ".join(asked.stderr.split())
    left_to_us = configure("auto")
    assert left_to_us.returncode == 0 and "CPU library only" in left_to_us.stdout
