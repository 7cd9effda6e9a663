"""The PTX of registered kernels: read, changed for the launches of a block, and put back."""

from pathlib import Path

import numpy as np
import pytest

import hoppersim

SOURCE = Path(__file__).parent / "kernels" / "runtime.cu"


@pytest.fixture(scope="module")
def library():
    return hoppersim.compile_cuda(SOURCE)


def scaled(library) -> np.ndarray:
    x = np.ones(4, np.float32)
    with hoppersim.simulate():
        library.call("run_scale", x, 4, 0.0)
        scaled.kernel = hoppersim.launches()[0]["mangled"]
    return x


def line_with(kernel: str, part: str) -> int:
    (line,) = [number for number, text in hoppersim.ptx_of(kernel).items() if part in text]
    return line


def test_ptx_of_a_kernel_is_its_lines(library):
    scaled(library)
    lines = hoppersim.ptx_of(scaled.kernel)
    assert f".entry {scaled.kernel}(" in lines[min(lines)] and lines[max(lines)] == "}"
    assert list(lines) == list(range(min(lines), max(lines) + 1))
    assert sum(".entry" in text for text in lines.values()) == 1 and "bar.sync" in " ".join(lines.values())


def test_lines_have_the_numbers_of_reports(library):
    scaled(library)
    line = line_with(scaled.kernel, "bar.sync")
    with hoppersim.edited(scaled.kernel, {line: "trap;"}):
        with pytest.raises(hoppersim.Fault, match=rf"line {line}: trap") as caught:
            scaled(library)
    assert caught.value.kind == "trap"


def test_an_edit_lasts_as_long_as_its_block(library):
    before = scaled(library)
    np.testing.assert_array_equal(before, [10, 13, 16, 19])
    line = line_with(scaled.kernel, "st.global.f32")
    with hoppersim.edited(scaled.kernel, {line: None}):
        np.testing.assert_array_equal(scaled(library), np.ones(4))
    np.testing.assert_array_equal(scaled(library), before)
    with pytest.raises(ZeroDivisionError), hoppersim.edited(scaled.kernel, {line: None}):
        1 / 0  # noqa: B018
    np.testing.assert_array_equal(scaled(library), before)


def test_variables_stay_where_they_are(library):
    """The host and other kernels see what an edited kernel writes, and it reads what they wrote."""
    scaled(library)
    line = line_with(scaled.kernel, "st.global.f32")
    before = library.call("read_touched")
    with hoppersim.edited(scaled.kernel, {line: None}):
        scaled(library)
    assert library.call("read_touched") == before + 4


def test_a_text_of_several_lines_stays_on_its_line(library):
    scaled(library)
    line = line_with(scaled.kernel, "bar.sync")
    with hoppersim.edited(scaled.kernel, {line: "bar.sync 0;\nbar.sync 0;\ntrap;"}):
        with pytest.raises(hoppersim.Fault, match=rf"line {line}: trap"):
            scaled(library)


def test_what_cannot_be_edited(library):
    scaled(library)
    line = line_with(scaled.kernel, "bar.sync")
    with pytest.raises(hoppersim.Fault, match=rf"line {line}"), hoppersim.edited(scaled.kernel, {line: "no.such 1;"}):
        pass
    with pytest.raises(hoppersim.Fault, match="nobody") as caught, hoppersim.edited("nobody", {}):
        pass
    assert caught.value.kind == "unknown kernel"
    with pytest.raises(ValueError, match="line 1 "), hoppersim.edited(scaled.kernel, {1: None}):
        pass
    with hoppersim.edited(scaled.kernel, {}), pytest.raises(RuntimeError, match="edited already"):
        with hoppersim.edited(scaled.kernel, {}):
            pass
    np.testing.assert_array_equal(scaled(library), [10, 13, 16, 19])
