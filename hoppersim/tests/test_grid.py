"""Clusters that wait for each other by flags in global memory, and CTAs of a cluster by flags in shared memory."""

import re

import numpy as np
import pytest
from async_ptx import both_timings, kernel

import hoppersim

seeds = pytest.mark.parametrize("seed", range(10))
LIMIT = 400_000  # of max_instructions, where a live-lock is expected: soon reached

WORK = """
mov.u32 %r3, 0;
WORK: add.u32 %r3, %r3, 1;
setp.lt.u32 %p3, %r3, 20000;
@%p3 bra WORK;
"""

# The CTA of that number sets a flag after some work, the others spin on it.
FLAG = (
    """
mov.u32 %r1, %ctaid.x;
setp.eq.u32 %p1, %r1, {setter};
@%p1 bra SET;
SPIN: ld.{load}.global.u32 %r2, [%a0];
setp.eq.u32 %p2, %r2, 0;
@%p2 bra SPIN;
ld.global.u32 %r4, [%a0+4];
mul.wide.u32 %rd1, %r1, 4;
add.u64 %rd1, %rd1, %a0;
st.global.u32 [%rd1+16], %r4;
bra END;
SET:
"""
    + WORK
    + """
st.global.u32 [%a0+4], 7;
st.{store}.global.u32 [%a0], 1;
END:
"""
)
BARRIER = """
atom.add.acq_rel.gpu.global.u32 %r1, [%a0], 1;
SPIN: ld.acquire.gpu.global.u32 %r2, [%a0];
setp.lt.u32 %p2, %r2, {count};
@%p2 bra SPIN;
"""


def run(body: str, grid: int, *, threads: int = 1, cluster: int = 1, **options) -> np.ndarray:
    out = np.zeros(1024, np.uint32)
    with hoppersim.simulate(**options):
        kernel(body).launch("k", grid, threads, (out,), cluster=(cluster, 1, 1))
    return out


def live_lock(body: str, grid: int, **options) -> str:
    with pytest.raises(hoppersim.Fault) as caught:
        run(body, grid, max_instructions=LIMIT, **options)
    assert caught.value.kind == "live-lock"
    return str(caught.value)


@both_timings
@seeds
@pytest.mark.parametrize("setter", [0, 1])
@pytest.mark.parametrize("store, load", [("release.gpu", "acquire.gpu"), ("volatile", "volatile")])
def test_a_cluster_waits_for_another(store, load, setter, seed, timing):
    out = run(FLAG.format(setter=setter, store=store, load=load), 2, seed=seed, timing=timing)
    assert out[4 + (1 - setter)] == 7


@both_timings
@seeds
def test_nobody_sets_the_flag(seed, timing):
    body = FLAG.format(setter=5, store="volatile", load="volatile")
    text = live_lock(body, 2, seed=seed, timing=timing)
    assert re.search(r"lanes 0x1 at ptx line \d+: .*; can run", text) and "--max-instructions) above 400000" in text


def test_all_clusters_have_begun():
    body = FLAG.format(setter=5, store="volatile", load="volatile")
    assert "have not begun" not in live_lock(body, 1)


@both_timings
@seeds
@pytest.mark.parametrize("host_threads", [1, 3])
def test_a_barrier_of_the_grid(seed, timing, host_threads):
    options = dict(seed=seed, timing=timing, host_threads=host_threads)
    assert run(BARRIER.format(count=40), 40, **options)[0] == 40
    assert run(BARRIER.format(count=40), 40, cluster=2, **options)[0] == 40
    assert "have not begun" not in live_lock(BARRIER.format(count=9), 8, **options)


def test_a_device_holds_so_many_at_once():
    """With 1024 threads a multiprocessor has two CTAs, the device 264."""
    body = "setp.ne.u32 %p3, %tid, 0;\n@%p3 bra END;\n" + BARRIER + "END:"
    assert run(body.format(count=264), 264, threads=1024)[0] == 264
    text = live_lock(body.format(count=265), 265, threads=1024)
    assert "have not begun, because the device holds 264 at once: 1 of 265" in text


CHAIN = """
mov.u32 %r1, %ctaid.x;
mul.wide.u32 %rd1, %r1, 4;
add.u64 %rd1, %rd1, %a0;
setp.eq.u32 %p1, %r1, 0;
@%p1 bra GO;
SPIN: ld.acquire.gpu.global.u32 %r2, [%rd1-4];
setp.eq.u32 %p2, %r2, 0;
@%p2 bra SPIN;
add.u32 %r1, %r2, 1;
bra PUT;
GO: mov.u32 %r1, 1;
PUT: st.release.gpu.global.u32 [%rd1], %r1;
"""


@both_timings
@seeds
def test_each_waits_for_the_one_before(seed, timing):
    assert list(run(CHAIN, 48, seed=seed, timing=timing)[:48]) == list(range(1, 49))


COOPERATIVE = r"""
#include <cooperative_groups.h>
#include <cuda.h>
namespace cg = cooperative_groups;
__global__ void shift(const int* in, int* out, int* sums) {
  auto grid = cg::this_grid();
  for (int round = 0; round < 3; ++round) {
    const int n = static_cast<int>(grid.size()), at = static_cast<int>(grid.thread_rank());
    out[at] = round ? out[at] : in[at];
    grid.sync();
    const int next = out[(at + 97) % n];
    grid.sync();
    out[at] = next + 1;
  }
  if (grid.thread_rank() == 0) *sums = static_cast<int>(grid.num_blocks());
}
extern "C" int run(int how, int grid, int block, const int* in, int* out, int* sums) {
  void* args[] = {&in, &out, &sums};
  if (how == 0) return cudaLaunchCooperativeKernel((void*)shift, grid, block, args, 0, 0);
  if (how == 1) {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative, cooperative.val.cooperative = 1;
    config.gridDim = grid, config.blockDim = block, config.attrs = &cooperative, config.numAttrs = 1;
    return cudaLaunchKernelExC(&config, (void*)shift, args);
  }
  cudaFunction_t function;
  if (how == 2)
    return cudaGetFuncBySymbol(&function, (void*)shift) ||
           cuLaunchCooperativeKernel(reinterpret_cast<CUfunction>(function), grid, 1, 1, block, 1, 1, 0, 0, args);
  shift<<<grid, block>>>(in, out, sums);
  return cudaGetLastError();
}
extern "C" int is_supported() {
  int value = 0;
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, 0);
  return cudaDeviceGetAttribute(&value, cudaDevAttrCooperativeLaunch, 0) == 0 && value && properties.cooperativeLaunch;
}
"""
TOO_LARGE = 720


@pytest.fixture(scope="module")
def cooperative(tmp_path_factory):
    source = tmp_path_factory.mktemp("grid") / "cooperative.cu"
    source.write_text(COOPERATIVE)
    return hoppersim.compile_cuda(source)


@both_timings
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", range(3))
def test_cooperative_launch(cooperative, how, seed, timing):
    numbers = np.arange(12 * 64, dtype=np.int32)
    out, blocks = np.zeros_like(numbers), np.zeros(1, np.int32)
    with hoppersim.simulate(seed=seed, timing=timing):
        assert cooperative.call("run", how, 12, 64, numbers, out, blocks) == 0
    np.testing.assert_array_equal(out, np.roll(numbers, -3 * 97) + 3)
    assert blocks[0] == 12 and cooperative.call("is_supported")


def test_cooperative_launch_must_fit(cooperative):
    out = np.zeros(265 * 1024, np.int32)
    with hoppersim.simulate():
        assert cooperative.call("run", 0, 265, 1024, out, out, out) == TOO_LARGE
    with pytest.raises(hoppersim.Fault, match="^trap"), hoppersim.simulate():  # an ordinary launch has no grid barrier
        cooperative.call("run", 3, 2, 64, out, out, out)


# Rank 0 spins on its shared flag, which rank 1 sets late; a second cluster does the same.
SHARED = (
    """
mov.u32 %r1, %cluster_ctarank;
st.shared.u32 [%buffer], 0;
barrier.cluster.arrive.release;
barrier.cluster.wait.acquire;
setp.eq.u32 %p1, %r1, {setter};
@%p1 bra SET;
SPIN: ld.acquire.cluster.shared.u32 %r2, [%buffer];
setp.eq.u32 %p2, %r2, 0;
@%p2 bra SPIN;
st.global.u32 [%a0], 1;
bra END;
SET:
"""
    + WORK
    + """
mapa.shared::cluster.u32 %r4, %buffer, 0;
st.release.cluster.shared::cluster.u32 [%r4], 1;
END:
barrier.cluster.arrive.release;
barrier.cluster.wait.acquire;
"""
)


@both_timings
@seeds
def test_a_cta_waits_for_another_of_its_cluster(seed, timing):
    assert run(SHARED.format(setter=1), 4, cluster=2, seed=seed, timing=timing)[0] == 1
    live_lock(SHARED.format(setter=2), 4, cluster=2, seed=seed, timing=timing)


# ---- Races in global memory: CTA 0 (%p1) writes the words from 64 on, the others read or write them

WRITE, READ = "st.global.u32 [%rd1], 5;", "ld.global.u32 %r5, [%rd1];"
PAIR = """
mov.u32 %r1, %ctaid.x;
shl.b32 %r2, %tid, 2;
cvt.u64.u32 %rd1, %r2;
add.u64 %rd1, %rd1, %a0;
add.u64 %rd1, %rd1, 256;
setp.eq.u32 %p1, %r1, 0;
setp.ne.u32 %p3, %tid, 0;
@!%p1 bra OTHER;
{first}
bar.sync 0;
@%p3 bra END;
{release}
bra END;
OTHER:
@%p3 bra READY;
{acquire}
READY: bar.sync 0;
{second}
END:
"""
SPIN = "SPIN: {} %r6, [%a0];\nsetp.eq.u32 %p2, %r6, 0;\n@%p2 bra SPIN;"
FLAGS = {
    "release, acquire": ("st.release.gpu.global.u32 [%a0], 1;", SPIN.format("ld.acquire.gpu.global.u32")),
    "volatile": ("membar.gl;\nst.volatile.global.u32 [%a0], 1;", SPIN.format("ld.volatile.global.u32")),
    "red": ("fence.acq_rel.gpu;\nred.global.add.u32 [%a0], 1;", SPIN.format("ld.relaxed.gpu.global.u32")),
    "exch, cas": (
        "membar.gl;\natom.global.exch.b32 %r7, [%a0], 1;",
        "SPIN: atom.global.cas.b32 %r6, [%a0], 1, 1;\nsetp.eq.u32 %p2, %r6, 0;\n@%p2 bra SPIN;",
    ),
    "a plain store behind a fence": ("membar.gl;\nst.global.u32 [%a0], 1;", SPIN.format("ld.volatile.global.u32")),
    "generic": ("st.release.gpu.u32 [%a0], 1;", SPIN.format("ld.acquire.gpu.u32")),
}
ACCESSES = {"raw": (WRITE, READ), "war": (READ, WRITE), "waw": (WRITE, WRITE.replace("5;", "%r1;"))}


def kinds(body: str, **options) -> set:
    found = set()
    for timing in ("early", "late"):
        for seed in range(10):
            try:
                run(body, 2, threads=64, seed=seed, timing=timing, **options)
                found.add(None)
            except hoppersim.Fault as fault:
                found.add(fault.kind)
    return found


@pytest.mark.parametrize("accesses", ACCESSES)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_orders_clusters(flag, accesses):
    first, second = ACCESSES[accesses]
    release, acquire = FLAGS[flag]
    parts = {"first": first, "second": second, "release": release, "acquire": acquire}
    assert kinds(PAIR.format(**parts)) == {None}
    nothing, no_acquire = {"acquire": "", "release": ""}, {"acquire": ""}
    too_early = {"first": "", "release": release + "\n" + first}
    for wrong in (nothing, no_acquire, too_early):
        assert kinds(PAIR.format(**{**parts, **wrong})) == {"race in global memory"}


def alone(first: str, second: str) -> str:
    return PAIR.format(first=first, second=second, release="", acquire="")


def test_what_is_no_race():
    """Other bytes, the value that is there already, strong accesses, reads, and a cluster's own accesses."""
    race = {"race in global memory"}
    assert kinds(alone("st.global.u16 [%rd1], 5;", "st.global.u16 [%rd1+2], 6;")) == {None}
    assert kinds(alone("st.global.u16 [%rd1], 5;", "ld.global.u32 %r5, [%rd1];")) == race
    assert kinds(alone(WRITE, WRITE)) == {None}
    assert kinds(alone(READ, READ)) == {None}
    assert kinds(alone("red.global.add.u32 [%rd1], 1;", "red.global.add.u32 [%rd1], 1;")) == {None}
    assert kinds(alone("st.volatile.global.u32 [%rd1], 1;", "ld.relaxed.gpu.global.u32 %r5, [%rd1];")) == {None}
    assert kinds(alone(WRITE, READ), cluster=2) == {None}


def test_order_passes_through_a_third_cluster():
    """CTA 0 writes and tells 1, which tells 2, which reads; and 2 is told by 1, which 0 has not told."""
    body = """
    mov.u32 %r1, %ctaid.x;
    setp.eq.u32 %p1, %r1, 0;
    setp.eq.u32 %p2, %r1, 1;
    @%p1 bra FIRST;
    @%p2 bra SECOND;
    WAIT2: ld.acquire.gpu.global.u32 %r6, [%a0+1024];
    setp.eq.u32 %p3, %r6, 0;
    @%p3 bra WAIT2;
    ld.global.u32 %r5, [%a0+256];
    bra END;
    FIRST:
    st.global.u32 [%a0+256], 5;
    st.release.gpu.global.u32 [%a0], 1;
    bra END;
    SECOND:
    {wait}
    st.release.gpu.global.u32 [%a0+1024], 1;
    END:
    """
    wait = SPIN.format("ld.acquire.gpu.global.u32")
    for seed in range(10):
        run(body.format(wait=wait), 3, seed=seed, host_threads=3)
        with pytest.raises(hoppersim.Fault, match="race in global memory"):
            run(body.format(wait=""), 3, seed=seed, host_threads=3)


@pytest.mark.parametrize("cluster, name", [(1, "by CTA (0, 0, 0) at"), (2, "by the cluster of CTA (0, 0, 0) at")])
def test_the_text_names_both_accesses(cluster, name):
    body = f"mov.u32 %r1, %ctaid.x;\nsetp.ge.u32 %p1, %r1, {cluster};\n@%p1 st.global.u32 [%a0], 5;\n"
    body += "@!%p1 ld.global.u32 %r5, [%a0];\n"
    with pytest.raises(hoppersim.Fault) as caught:
        run(body, 2 * cluster, cluster=cluster, host_threads=1)
    text = str(caught.value)
    assert re.search(r"writes global address 0x\w+, which was read by", text) and "nothing orders the two" in text
    assert name in text and f"st.global.u32 [%a0], 5, CTA ({cluster}, 0, 0)" in text
