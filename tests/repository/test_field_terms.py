"""Who greps csrc/ for a word of the field finds the place; and what the documents name exists."""

import re

import pytest
from support.paths import ROOT

HOPPER = "csrc/hopper/"
RULE = "csrc/gated_delta_rule/"
CONV = "csrc/dynamic_conv/"

# A term and a file that it must lead to.
TERMS = [
    # PTX and CUTLASS
    ("mbarrier.try_wait", HOPPER + "barrier.h"),
    ("mbarrier.arrive.expect_tx", HOPPER + "barrier.h"),
    ("fence.proxy.async", HOPPER + "barrier.h"),
    ("fence.mbarrier_init", HOPPER + "barrier.h"),
    ("phase parity", HOPPER + "barrier.h"),
    ("named barrier", HOPPER + "barrier.h"),
    ("bar.sync", HOPPER + "barrier.h"),
    ("mapa", HOPPER + "barrier.h"),
    ("barrier.cluster", HOPPER + "cluster.h"),
    ("warp specialisation", HOPPER + "warp_specialization.h"),
    ("warp specialization", HOPPER + "warp_specialization.h"),
    ("elect.sync", HOPPER + "warp_specialization.h"),
    ("setmaxnreg", HOPPER + "warp_specialization.h"),
    ("producer", HOPPER + "pipeline.h"),
    ("consumer", HOPPER + "pipeline.h"),
    ("PipelineState", HOPPER + "pipeline.h"),
    ("circular buffer", HOPPER + "pipeline.h"),
    ("cuTensorMapEncodeTiled", HOPPER + "tensor_map.h"),
    ("TMA descriptor", HOPPER + "tensor_map.h"),
    ("cp.async.bulk.tensor", HOPPER + "tma.h"),
    ("cp.async.bulk.wait_group.read", HOPPER + "tma.h"),
    (".multicast::cluster", HOPPER + "tma.h"),
    ("cache_hint", HOPPER + "tma.h"),
    ("prefetch.tensormap", HOPPER + "tma.h"),
    ("swizzle", HOPPER + "layout.h"),
    ("core matrices", HOPPER + "layout.h"),
    ("K-major", HOPPER + "layout.h"),
    ("wgmma.fence", HOPPER + "wgmma.h"),
    ("wgmma.commit_group", HOPPER + "wgmma.h"),
    ("wgmma.wait_group", HOPPER + "wgmma.h"),
    ("wgmma.mma_async", HOPPER + "wgmma.h"),
    ("matrix descriptor", HOPPER + "wgmma.h"),
    ("ldmatrix", HOPPER + "mma.h"),
    ("stmatrix", HOPPER + "mma.h"),
    ("mma.sync", HOPPER + "mma.h"),
    ("st.shared.v4", HOPPER + "convert.h"),
    ("programmatic dependent launch", HOPPER + "launch.h"),
    ("griddepcontrol.wait", HOPPER + "launch.h"),
    ("griddepcontrol.launch_dependents", HOPPER + "launch.h"),
    # The gated delta rule: papers and flash-linear-attention
    ("UT transform", RULE + "chunk/inverse.cuh"),
    ("solve_tril", RULE + "chunk/inverse.cuh"),
    ("kkt", RULE + "chunk/prepare.cuh"),
    ("chunk_local_cumsum", RULE + "chunk/prepare.cuh"),
    ("intra-chunk", RULE + "chunk/prepare.cuh"),
    ("WY representation", RULE + "chunk/sweep.cuh"),
    ("recompute_w_u", RULE + "chunk/sweep.cuh"),
    ("inter-chunk", RULE + "chunk/sweep.cuh"),
    ("chunk_fwd_h", RULE + "chunk/sweep.cuh"),
    ("chunk_fwd_o", RULE + "chunk/sweep.cuh"),
    ("varlen", RULE + "chunk/plan.cuh"),
    ("grouped value attention", RULE + "chunk/chunk_gated_delta_rule.h"),
    ("GVA", RULE + "chunk/chunk_gated_delta_rule.h"),
    ("prefill", RULE + "chunk/chunk_gated_delta_rule.h"),
    ("bwd_dhu", RULE + "chunk/backward_cpu.cpp"),
    ("decode", RULE + "recurrent/recurrent_gated_delta_rule.h"),
    ("speculative decoding", RULE + "recurrent/recurrent_gated_delta_rule_verify.h"),
    # The convolution
    ("depthwise", CONV + "prefill/dynamic_conv.h"),
    ("short convolution", CONV + "prefill/dynamic_conv.h"),
    ("kernel generator", CONV + "prefill/dynamic_conv.h"),
    ("ping-pong", CONV + "gemm/pingpong.cuh"),
    ("decode", CONV + "step/dynamic_conv_step.h"),
]

SOURCES = {".py", ".h", ".cuh", ".cu", ".cpp"}


@pytest.mark.parametrize("term, path", TERMS)
def test_grep_finds_the_term_where_the_thing_is(term, path):
    lines = (ROOT / path).read_text().lower().splitlines()
    assert [line for line in lines if term.lower() in line], (
        f"no line of {path} has {term!r}: a term must not be wrapped"
    )


def rows_of_glossary():
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 3 and "`" in cells[2]:
            yield pytest.param(cells[1], re.findall(r"`([^`]+)`", cells[2]), id=cells[0][:40])


@pytest.mark.parametrize("here, files", list(rows_of_glossary()))
def test_the_glossary_names_what_is_in_the_files(here, files):
    text = "\n".join(name + (ROOT / name).read_text() for name in files)
    names = re.findall(r"`(\w+)`", here)
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


def words_of_the_source() -> set[str]:
    folders = ("csrc", "bindings", "jetkernels", "reference", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    return {word for path in files for word in re.findall(r"\w+", path.stem + " " + path.read_text())}


def test_data_sheets_name_what_exists():
    known = words_of_the_source()
    for name in ("chunk_gated_delta_rule", "gated_delta_rule", "dynamic_conv", "forecast"):
        quoted = re.findall(r"`([^`\n]+)`", (ROOT / "docs" / f"{name}.md").read_text())
        names = {word for text in quoted for word in re.findall(r"\b[A-Za-z]\w*_\w+|\b[A-Z][a-z]+[A-Z]\w+", text)}
        assert names - known == set(), name
