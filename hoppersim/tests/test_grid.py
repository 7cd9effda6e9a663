"""Clusters that wait for each other by flags in global memory, and CTAs of a cluster by flags in shared memory."""

import re

import numpy as np
import pytest
from async_ptx import both_timings, kernel

import hoppersim

seeds = pytest.mark.parametrize("seed", range(10))
LIMIT = 400_000  # of max_instructions, where a live-lock is expected: soon reached

# The CTA of that number sets a flag after some work, the others spin on it.
FLAG = """
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
mov.u32 %r3, 0;
WORK: add.u32 %r3, %r3, 1;
setp.lt.u32 %p3, %r3, 20000;
@%p3 bra WORK;
st.global.u32 [%a0+4], 7;
st.{store}.global.u32 [%a0], 1;
END:
"""
BARRIER = """
atom.add.acq_rel.gpu.global.u32 %r1, [%a0], 1;
SPIN: ld.acquire.gpu.global.u32 %r2, [%a0];
setp.lt.u32 %p2, %r2, {count};
@%p2 bra SPIN;
"""


def run(body: str, grid: int, *, threads: int = 1, cluster: int = 1, **options) -> np.ndarray:
    out = np.zeros(64, np.uint32)
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
    assert (
        re.search(r"lanes 0x1 at ptx line \d+: .*; can run", text) and "raise simulate(max_instructions=400000)" in text
    )


def test_all_clusters_have_begun():
    body = FLAG.format(setter=5, store="volatile", load="volatile")
    assert "have not begun" not in live_lock(body, 1)


@seeds
def test_a_barrier_of_the_grid_needs_all_clusters_at_once(seed):
    body = BARRIER.format(count=8)
    text = live_lock(body, 8, seed=seed)
    assert re.search(r"have not begun: [67] of 8; simulated at once: 2", text)
    assert "host_threads=8" in text and "HOPPERSIM_HOST_THREADS=8" in text
    assert run(body, 8, seed=seed, host_threads=8)[0] == 8


# Rank 0 spins on its shared flag, which rank 1 sets late; a second cluster does the same.
SHARED = """
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
mov.u32 %r3, 0;
WORK: add.u32 %r3, %r3, 1;
setp.lt.u32 %p3, %r3, 20000;
@%p3 bra WORK;
mapa.shared::cluster.u32 %r4, %buffer, 0;
st.release.cluster.shared::cluster.u32 [%r4], 1;
END:
barrier.cluster.arrive.release;
barrier.cluster.wait.acquire;
"""


@both_timings
@seeds
def test_a_cta_waits_for_another_of_its_cluster(seed, timing):
    assert run(SHARED.format(setter=1), 4, cluster=2, seed=seed, timing=timing)[0] == 1
    live_lock(SHARED.format(setter=2), 4, cluster=2, seed=seed, timing=timing)
