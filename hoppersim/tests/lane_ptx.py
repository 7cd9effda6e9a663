"""PTX kernels that apply a few instructions to arrays, one thread per element."""

import numpy as np

import hoppersim

_TYPES = {
    "u8": np.uint8,
    "u16": np.uint16,
    "s16": np.int16,
    "b16": np.uint16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
    "f32": np.float32,
    "f64": np.float64,
}
_REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"


def lanes(body: str, inputs, out: str, declare: str = "") -> np.ndarray:
    """Runs ``body`` with inputs in %x0, %x1, … and the result in %y; ``inputs``: arrays of one length, or (type,
    array).
    """
    pairs = [
        i if isinstance(i, tuple) else (i.dtype.kind.replace("i", "s") + str(8 * i.dtype.itemsize), i) for i in inputs
    ]
    count = len(pairs[0][1])
    result = np.zeros(count, _TYPES[out])
    arrays = [np.ascontiguousarray(array) for _, array in pairs] + [result]
    types = [t for t, _ in pairs] + [out]
    names = [f"%x{k}" for k in range(len(pairs))] + ["%y"]
    text = (
        HEADER
        + ".visible .entry k("
        + ", ".join(f".param .u64 p{k}" for k in range(len(arrays)))
        + ", .param .u32 n)\n{\n"
    )
    text += ".reg .pred %p<8>;\n.reg .b32 %t<8>;\n.reg .b64 %a<8>;\n.reg .pred %out;\n" + declare
    for name, array in zip(names, arrays):
        text += f".reg .{_REGISTER[array.itemsize]} {name};\n"
    text += "mov.u32 %t0, %ctaid.x;\nmov.u32 %t1, %ntid.x;\nmov.u32 %t2, %tid.x;\nmad.lo.s32 %t0, %t0, %t1, %t2;\n"
    text += "ld.param.u32 %t1, [n];\nsetp.ge.u32 %out, %t0, %t1;\n@%out bra END;\n"
    for k, (name, array, kind) in enumerate(zip(names, arrays, types)):
        text += f"ld.param.u64 %a{k}, [p{k}];\nmad.wide.u32 %a{k}, %t0, {array.itemsize}, %a{k};\n"
        if name != "%y":
            text += f"ld.global.{kind if kind == 'u8' else 'b' + str(8 * array.itemsize)} {name}, [%a{k}];\n"
    text += body + f"\nst.global.b{8 * result.itemsize} [%a{len(pairs)}], %y;\nEND:\nret;\n}}\n"
    hoppersim.Module(text).launch("k", (count + 127) // 128, 128, (*arrays, count))
    return result


def kernel(body: str, parameters: str = ".param .u64 out", declare: str = "") -> str:
    """A kernel of name k with registers %p, %r, %rd, %f and the address of the first parameter in %rd0, the thread in
    %r0.
    """
    return (
        HEADER
        + declare
        + f".visible .entry k({parameters})\n{{\n.reg .pred %p<10>;\n.reg .b16 %h<10>;\n.reg .b32 %r<40>;\n"
        ".reg .b64 %rd<20>;\n.reg .f32 %f<20>;\n"
        "ld.param.u64 %rd0, [out];\nmov.u32 %r0, %tid.x;\n" + body + "\nret;\n}\n"
    )


def store(value: str) -> str:
    """Stores a b32 register to out[thread]."""
    return f"mul.wide.u32 %rd19, %r0, 4;\nadd.s64 %rd19, %rd0, %rd19;\nst.global.b32 [%rd19], {value};\n"


def fault_of(text: str, args, block=32, grid=1, **options) -> "hoppersim.Fault":
    """The fault of a launch that must have one."""
    import pytest

    with hoppersim.simulate(**options), pytest.raises(hoppersim.Fault) as caught:
        hoppersim.Module(text).launch("k", grid, block, args)
    return caught.value
