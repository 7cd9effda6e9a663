"""Damages saved folders at random and loads them: each load gives a model, or a sentence that names the file; never
anything else.

    python tests/campaigns/damaged_folders.py --cases 10000

Bytes are flipped, JSON values replaced, headers of weight files rewritten, files cut, emptied, removed, exchanged, or
replaced by folders, pipes and links. A load may raise ValueError or OSError, in one line that names something in the
folder. It must not write there, take seconds, or give a model whose weights have another dtype or shape than its config
says. Prints one JSON line.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        10**6,
        2**31,
        2**63,
        2**70,
        10**300,
        0.5,
        -0.0,
        1e-30,
        1e308,
        math.inf,
        -math.inf,
        math.nan,
    ),
    *(
        "",
        "x",
        "no",
        "1e-5",
        "nan",
        "float16",
        "int8",
        "complex64",
        "load",
        "F16",
        "I8",
        "BOOL",
        "F8_E4M3",
        "C64",
        "\0",
        "\ud800",
        "ü" * 300,
    ),
    *(
        "config.json",
        "../m/model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "model.safetensors",
        "a.safetensors",
    ),
    *(
        [],
        [None],
        [1],
        [[]],
        [-1, 4],
        [2**40, 2**40],
        ["jet"],
        ["attn"] * 3,
        ["attn"] * 5000,
        {},
        {"a": 1},
        {"jet": None},
        {"swa": []},
    ),
]


def nested(depth: int) -> bytes:
    return b'{"a": ' * depth + b"1" + b"}" * depth


def mutated(value: object, draw: random.Random) -> object:
    """A JSON value with one of its parts replaced, removed, doubled or renamed."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        value = value.copy()
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        kind = draw.random()
        if kind < 0.75:
            value[key] = mutated(value[key], draw)
        elif kind < 0.87:
            del value[key]
        elif isinstance(value, dict):
            value[str(draw.choice(VALUES))] = value.pop(key) if draw.random() < 0.5 else value[key]
        else:
            value.append(value[key])
        return value
    return draw.choice(VALUES)


def weights_damaged(content: bytes, draw: random.Random) -> bytes:
    """A weight file with another header: in a value, or in what it says of its length."""
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    if draw.random() < 0.15:
        return (
            struct.pack("<Q", draw.choice([0, 1, size - 1, size + 1, len(content), 2**32, 2**63, 2**64 - 1]))
            + content[8:]
        )
    if draw.random() < 0.25:
        body = draw.randbytes(len(body))  # values of all kinds, NaN and inf too
    else:
        header = mutated(header, draw)
    line = json.dumps(header).encode()
    return struct.pack("<Q", len(line)) + line + body


def damage_bytes(name: str, content: bytes, draw: random.Random) -> bytes:
    kind = draw.random()
    with suppress(ValueError, struct.error, RecursionError, AttributeError):  # damaged before: then bytes only
        if kind < 0.6 and name.endswith(".json"):
            return json_damaged(content, draw)
        if kind < 0.6 and name.endswith(".safetensors"):
            return weights_damaged(content, draw)
    if kind < 0.85 and content:
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 8, 50])):
            where = draw.randrange(min(len(damaged), draw.choice([16, 400, len(damaged)])))
            damaged[where] = draw.choice([draw.randrange(256), damaged[where] ^ 1 << draw.randrange(8)])
        return bytes(damaged)
    cut = draw.randrange(len(content) + 1)
    return draw.choice(
        [b"", content[:cut], content[cut:], content + content[:cut], content + b"\0", draw.randbytes(cut)]
    )


def json_damaged(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.1:
        text = content.decode()
        return draw.choice(
            [
                b"\xef\xbb\xbf" + content,
                text.encode("utf-16"),
                nested(100_000),
                nested(500),
                b"[" * 50_000,
                b"null",
                b"[]",
                b"{}",
                b"3",
                content.replace(b"{", b'{"a": 1, "a": 2, ', 1),
                content + content,
                content.replace(b":", b"", 1),
                content.replace(b'"', b"'"),
            ]
        )
    return json.dumps(mutated(json.loads(content), draw)).encode()


def damage(folder: Path, draw: random.Random) -> str:
    """Changes one thing in a folder. Returns what."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    if not names:
        return "nothing left"
    path = folder / draw.choice(names)
    kind = draw.random()
    if kind < 0.85:
        path.write_bytes(damage_bytes(path.name, path.read_bytes(), draw))
        return f"{path.name} damaged"
    other = folder / draw.choice([*names, "model-00009-of-00009.safetensors", "elsewhere"])
    what = draw.choice(["removed", "renamed", "folder", "pipe", "link", "loop", "full folder", "copied"])
    if what == "copied":
        if other != path:
            shutil.copyfile(path, other)
    elif what == "renamed":
        path.rename(other)
    else:
        path.unlink()
        if what == "pipe":
            os.mkfifo(path)
        elif what == "link":
            path.symlink_to(other.name if other != path else "gone")
        elif what == "loop":
            path.symlink_to(path.name)
        elif "folder" in what:
            path.mkdir()
            if what == "full folder":
                (path / "model.safetensors").write_text("")
    return f"{path.name} {what} {other.name}"


def state_of(folder: Path) -> list[tuple]:
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found.append((str(path), status.st_mode, status.st_size, status.st_mtime_ns, digest))
    return found


def check_model(model) -> None:
    """The weights have the config's dtype, but for the gates, and a shape each that the config gives."""
    import torch

    config = model.config
    assert config.dtype.is_floating_point, config.dtype
    for name, parameter in model.named_parameters():
        need = torch.float32 if name.endswith(("A_log", "dt_bias")) else config.dtype
        assert parameter.dtype == need and parameter.device.type == "cpu", (name, parameter.dtype, need)
    assert model.head_weight.shape == (config.vocab_size, config.hidden_size)
    assert len(model.model.layers) == config.num_hidden_layers


def check_tokenizer(tokenizer) -> None:
    assert isinstance(tokenizer.vocab_size, int)


def subjects(folder: Path) -> list[tuple[str, Callable, Callable]]:
    """Makes folders to be damaged: (name, what loads it, what checks the result)."""
    import torch
    from support.model_cases import small_config

    from jetkernels.model import JetNemotronForCausalLM, Tokenizer
    from jetkernels.postnas import from_pretrained, small_base

    jet = {
        "num_heads": 1,
        "head_dim": 4,
        "expand_v": 1.0,
        "conv_size": 2,
        "dconv_generator_reduction": 2,
        "norm_eps": "1e-5",
    }
    sizes = {
        "vocab_size": 5,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    sizes["efficient_attention_config"] = {"jet": jet, "swa": {"window_size": 2}}
    tied = JetNemotronForCausalLM.random(small_config(("jet", "swa"), **sizes))
    tied.save_pretrained(folder / "tied")
    untied = JetNemotronForCausalLM.random(
        small_config(("jet", "attn"), tie_word_embeddings=False, **sizes), dtype=torch.bfloat16
    )
    untied.companions = {"generation_config.json": b"{}"}
    untied.save_pretrained(folder / "shards", 300)
    Tokenizer.byte_level().save_pretrained(folder / "text")
    base = {
        "vocab_size": 5,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    small_base(2, **base).save_pretrained(folder / "base")
    values = json.loads((folder / "base" / "config.json").read_text())
    kept = {
        key: values[key]
        for key in (*base, "num_hidden_layers", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "torch_dtype")
    }
    (folder / "base" / "config.json").write_text(json.dumps(kept | {"model_type": "qwen2", "rope_scaling": None}))
    return [
        ("tied", JetNemotronForCausalLM.from_pretrained, check_model),
        ("shards", JetNemotronForCausalLM.from_pretrained, check_model),
        ("text", Tokenizer.from_pretrained, check_tokenizer),
        ("base", from_pretrained, check_model),
    ]


def sentence_of(error: BaseException, folder: Path) -> str | None:
    """What is wrong with an error; None if it is as it should be."""
    text = str(error)
    if not isinstance(error, (ValueError, OSError)):
        return f"{type(error).__module__}.{type(error).__name__}: {text}"
    if not text or len(text) > 2500 or "\n" in text or str(folder) not in text:
        return f"{type(error).__name__} in other words: {text[:500]!r}"
    return None


def one(name: str, load: Callable, check: Callable, folder: Path, draw: random.Random) -> tuple[str, str | None, float]:
    """(kind of outcome, what is wrong if anything, CPU seconds) of a damaged copy in `folder`."""
    what = "; ".join(damage(folder, draw) for _ in range(draw.choice([1, 1, 1, 2, 4])))
    before = state_of(folder)
    start, outcome, wrong = time.process_time(), "loaded", None
    try:
        loaded = load(folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome, wrong = type(error).__name__, sentence_of(error, folder)
    else:
        try:
            check(loaded)
        except Exception as error:
            wrong = f"loaded wrongly: {type(error).__name__}: {error}"
    seconds = time.process_time() - start
    if state_of(folder) != before:
        wrong = f"changed the folder; {wrong}"
    if seconds > 5:
        wrong = f"took {seconds:.0f} s; {wrong}"
    return outcome, wrong and f"{name}: {what}: {wrong}", seconds


@contextmanager
def little_memory() -> Iterator[None]:
    """Whoever believes a damaged number must not take the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + 2**31, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def campaign(cases: int, seed: int, where: Path) -> dict:
    made = subjects(where / "good")
    for name, load, _ in made:
        load(where / "good" / name)
    outcomes, wrong, slowest = Counter(), [], 0.0
    with little_memory():
        for case in range(cases):
            draw = random.Random(f"{seed} {case}")
            name, load, check = made[case % len(made)]
            folder = where / "m"
            shutil.copytree(where / "good" / name, folder)
            outcome, found, seconds = one(name, load, check, folder, draw)
            shutil.rmtree(folder)
            outcomes[outcome] += 1
            slowest = max(slowest, seconds)
            if found:
                wrong.append(f"case {case}: {found}")
    return {
        "cases": cases,
        "wrong": len(wrong),
        "outcomes": dict(outcomes),
        "slowest_cpu_s": round(slowest, 2),
        "which": wrong,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(arguments.cases, arguments.seed, Path(folder))
    print(json.dumps(found, indent=1))
    return int(found["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
