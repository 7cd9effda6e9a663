"""What the compiler may say of a kernel: cmake/compile_with_report.cmake stops the build on the rest."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

SCRIPT = ROOT / "cmake" / "compile_with_report.cmake"
SERIALISED = (
    "ptxas info    : (%s) Potential Performance Loss: wgmma.mma_async instructions are serialized due to %s "
    "for the function '%s'"
)
REPORT = "ptxas info    : Used 168 registers, used 1 barriers"


def compile_that_says(text: str, tmp_path: Path, *options: str) -> tuple[int, str]:
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake: pip install cmake")
    report = tmp_path / "report"
    (tmp_path / "text").write_text(text)
    command = [cmake, f"-DCOMMAND=cat;{tmp_path / 'text'}", f"-DREPORT={report}", *options, "-P", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert text in report.read_text()  # kept, whatever it says
    return done.returncode, " ".join(done.stderr.split())


@pytest.mark.parametrize("code", ["C7507", "C7510", "C7511", "C7512", "C7514", "C7515", "C7517"])
def test_serialised_wgmma_stops_the_build(code, tmp_path):
    line = SERIALISED % (code, "insufficient register resources", "_ZN3jet6hopper12other_kernelEv")
    failed, said = compile_that_says(f"{REPORT}\n{line}\n{REPORT}", tmp_path)
    assert failed and code in said and "other_kernel" in said
    assert not compile_that_says(line, tmp_path, "-DONLY_RIGHT=ON")[0]


def test_spill_stops_the_build(tmp_path):
    line = "    8 bytes stack frame, 16 bytes spill stores, 16 bytes spill loads"
    failed, said = compile_that_says(line, tmp_path)
    assert failed and "register spill" in said
    assert not compile_that_says(line, tmp_path, "-DONLY_RIGHT=ON")[0]


def test_clean_report_passes(tmp_path):
    for text in (REPORT, "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"):
        assert compile_that_says(text, tmp_path) == (0, "")
