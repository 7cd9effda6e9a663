"""Kernels in PTX for the tests of mbarriers, copies and clusters: a body between a fixed head and `ret`."""

import numpy as np
import pytest

import hoppersim

_HEAD = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry k({parameters})
{{
  .reg .pred %p<16>;
  .reg .b16 %h<16>;
  .reg .b32 %r<64>;
  .reg .b64 %rd<64>;
  .reg .f32 %f<16>;
  .shared .align 1024 .b8 buffer[{bytes}];
  .shared .align 8 .b64 bars[8];
  mov.u32 %tid, %tid.x;
"""

both_timings = pytest.mark.parametrize("timing", ["early", "late"])


def kernel(body: str, *, arrays: int = 1, maps: int = 0, bytes: int = 16384) -> hoppersim.Module:
    """``%tid``: thread; ``%a0``, ``%a1`` …: addresses of the arrays; ``%m0`` …: of the tensor maps (the first
    parameters); ``%buffer``, ``%bar``, ``%bar1``: shared addresses. Loops wait for a barrier: ``WAIT(bar, parity)``.
    """
    parameters = [f".param .align 64 .b8 m{n}[128]" for n in range(maps)] + [f".param .u64 a{n}" for n in range(arrays)]
    lines = [".reg .b32 %tid, %buffer, %bar, %bar1, %bar2;"]
    for n in range(maps):
        lines += [f".reg .b64 %m{n};", f"mov.b64 %m{n}, m{n};", f"cvta.param.u64 %m{n}, %m{n};"]
    for n in range(arrays):
        lines += [f".reg .b64 %a{n};", f"ld.param.u64 %a{n}, [a{n}];"]
    lines += ["mov.u32 %buffer, buffer;", "mov.u32 %bar, bars;", "add.u32 %bar1, %bar, 8;", "add.u32 %bar2, %bar, 16;"]
    head, tid = _HEAD.format(parameters=", ".join(parameters), bytes=bytes).rsplit("\n", 2)[:2]
    text = "\n  ".join([head, *lines, tid, *(_expanded(line.strip(), n) for n, line in enumerate(body.splitlines()))])
    return hoppersim.Module(text + "\n  ret;\n}\n")


def _expanded(line: str, number: int) -> str:
    if not line.startswith("WAIT("):
        return line
    barrier, parity = line[5:].split(")")[0].split(",")
    return f"W{number}: mbarrier.try_wait.parity.shared::cta.b64 %p15, [{barrier}], {parity};\n  @!%p15 bra W{number};"


def launch(
    module: hoppersim.Module, args, *, threads: int = 32, cluster: int = 1, timing: str = "early", seed: int = 0
) -> dict:
    with hoppersim.simulate(timing=timing, seed=seed, strict=True):
        return module.launch("k", cluster, threads, args, cluster=(cluster, 1, 1))


def finding(
    body: str, args=None, *, threads: int = 32, cluster: int = 1, timing: str = "early", **options
) -> "hoppersim.Fault":
    """The Fault that the kernel ends with."""
    args = (np.zeros(4096, np.uint32),) if args is None else args
    with pytest.raises(hoppersim.Fault) as caught:
        launch(
            kernel(body, arrays=len(args) - options.get("maps", 0), **options),
            args,
            threads=threads,
            cluster=cluster,
            timing=timing,
        )
    return caught.value


# One thread sets up a barrier for one arrival; the others wait for that.
INIT = """
setp.ne.u32 %p0, %tid, 0;
@%p0 bra READY;
mbarrier.init.shared::cta.b64 [%bar], 1;
mbarrier.init.shared::cta.b64 [%bar1], 1;
fence.mbarrier_init.release.cluster;
READY:
bar.sync 0;
"""
