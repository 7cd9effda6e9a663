"""A random driver for the command line: valid command lines with a part of them gone bad.

`python -m tests.campaigns.bad_arguments 2000` runs until so many were refused and prints what it saw. Whatever is
refused must end with one sentence and exit code 1 or 2, and must have written nothing; whatever is accepted must run.
"""

import contextlib
import io
import os
import random
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from support.postnas_cases import text_folder, tiny_base_folder

from jetkernels.__main__ import main
from jetkernels.cli import demo, search, throughput
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer
from jetkernels.postnas.pipeline import Pipeline

VALUES = [
    "-1",
    "0",
    "-0",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "-1e308",
    "1e-320",
    "1e400",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "1_000",
    "½",
    "٣",
    "1.5",
]
VALUES += [
    "",
    " ",
    "x",
    "\udcff",
    "a\0b",
    "é" * 40,
    "a" * 100_000,
    "1,2",
    "1,,2",
    ",",
    "1,x",
    "-1,3",
    "{}",
    "[1]",
    "-",
    "--",
    "None",
    "true",
    "%s %d",
]
VALUES += [
    "cuda",
    "cuda:7",
    "cuda:-1",
    "mps",
    "meta",
    "nonsense",
    "cpu:99",
    "xpu:0",
    "org/name",
    "../..",
    "/",
    ".",
    "~",
    "/dev/null",
    "/dev/null/x",
]
VALUES += [
    "/proc/nowhere/x",
    "/etc/passwd",
    "jet attn swa",
    "jet jet jet",
    "attn attn attn",
    "8x16",
    "0x0x0",
    "8x16x99999999",
    "1x1x1",
    "x" * 300,
]
NUMBERS = [
    "1",
    "2",
    "3",
    "7",
    "31",
    "63",
    "64",
    "79",
    "80",
    "255",
    "256",
    "257",
    "4096",
    "32768",
    "65535",
    "65536",
    "65537",
    "1000001",
    "2147483647",
]
NUMBERS += [
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "0.25",
    "1.0",
    "0.999999",
    "1e-45",
    "1e-30",
    "1e30",
]
WORDS = [
    "--bogus",
    "--",
    "-x",
    "stray",
    "--help=1",
    "--version",
    "-1",
    "é",
    "\udcff",
    "--device",
    "--output",
    "--prompt",
]


class Ran(Exception):
    """The command line was accepted, and heavy work was about to begin."""


class World:
    """A folder with inputs, and valid command lines on them."""

    def __init__(self, root: Path):
        self.root = root
        self.cwd = root / "cwd"
        self.cwd.mkdir()
        config = JetNemotronConfig(**{**demo.CONFIG, "hidden_size": 48, "intermediate_size": 64})
        config.save(root / "tiny.json")
        JetNemotronForCausalLM.random(config).save_pretrained(root / "model")
        Tokenizer.byte_level().save_pretrained(root / "model")
        (root / "prompts.txt").write_text("def f\nclass A\n")
        (root / "questions.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
        text, base = text_folder(root / "text", 12), tiny_base_folder(root / "base")
        model = {"--model": root / "model", "--device": "cpu", "--seed": "1", "--dtype": "fp32"}
        drawn = {"--config": root / "tiny.json", "--random-weights": None, "--device": "cpu"}
        drawing = {
            "--max-new-tokens": "3",
            "--temperature": "0.7",
            "--top-k": "5",
            "--top-p": "0.9",
            "--prefill-chunk": "2",
            "--batch": "2",
        }
        speed = {"--batch": "2", "--prompt-length": "8", "--new-tokens": "2", "--repeats": "1", "--prefill-chunk": "4"}
        JetNemotronConfig(**demo.CONFIG | {"hidden_size": 48, "layer_types": ["attn"] * 2}).save(root / "attn.json")
        beside = {
            "--against": root / "attn.json",
            "--contexts": "4,1K",
            "--batches": "1,2",
            "--memory": "0.01",
            "--new-tokens": "2",
            "--prefill": None,
            "--prefill-chunk": "4",
            "--seconds": "1",
            "--minutes": "1",
            "--output": "out",
        }
        training = {
            "--output": "out",
            "--text": text,
            "--suffix": ".txt",
            "--steps": "1",
            "--learning-rate": "0.01",
            "--batch": "2",
        }
        training |= {
            "--length": "80",
            "--task-share": "0.5",
            "--distances": "4,16",
            "--save-every": "2",
            "--device": "cpu",
            "--seed": "0",
        }
        scoring = {
            "--base": base,
            "--examples": "2",
            "--questions": root / "questions.jsonl",
            "--window-size": "8",
        }
        distilling = {"--layer-steps": "1", "--precision": "fp32", "--train-attention": None}
        sizes = {"--layers": "2", "--hidden-size": "32", "--intermediate-size": "48"}
        compared = (
            training
            | scoring
            | {"--placement": "jet attn swa", "--task": "recall", "--objective": "loss", "--seeds": "1"}
        )
        compared |= distilling | {"--together": "2", "--speed-batch": "1", "--speed-prompt": "4", "--speed-tokens": "2"}
        self.lines: list[tuple[list[str], dict]] = [
            (["info"], {"--json": None}),
            (["demo"], {"--minutes": "1", "--output": "out", "--device": "cpu", "--seed": "0"}),
            (["generate"], model | drawing | {"--prompt": "def f"}),
            (["generate"], model | drawing | {"--prompt-file": root / "prompts.txt", "--json": None}),
            (["generate"], drawn | drawing | {"--prompt-ids": "1,2,3"}),
            (["generate"], model | {"--prompt": "def f", "--draft": "3", "--max-new-tokens": "3"}),
            (["throughput"], model | speed),
            (["throughput"], drawn | speed | {"--json": None}),
            (["throughput"], drawn | beside),
            (["search", "base"], training | sizes),
            (
                ["search", "placement"],
                training
                | scoring
                | {"--full": "1", "--window": "1", "--full-task": "copy", "--width": "2", "--shape": "8x16x2"}
                | {"--full-objective": "accuracy", "--window-objective": "loss", "--budgets": "1,2"}
                | distilling
                | {"--linear-path": "JetBlock", "--start": "random"},
            ),
            (["search", "blocks"], compared | {"--shape": "8x16x2", "--equal": "state", "--only": "JetBlock"}),
            (["search", "design"], compared | {"--shape": "8x16x2"}),
            (
                ["search", "shapes"],
                compared
                | {"--state": "128", "--heads": "1,2", "--keys": "8,16", "--min-share": "0.5"}
                | {"--block": "JetBlock", "--design": "reduction 2", "--start": "random"},
            ),
            (
                ["search", "final"],
                training
                | {"--base": base, "--model": root / "model", "--whole-steps": "1", "--examples": "2"}
                | {"--whole-learning-rate": "0.001"},
            ),
            (
                ["search", "all"],
                training
                | sizes
                | {"--base-steps": "1", "--seeds": "1", "--shape": "8x16x4", "--block": "JetBlock"}
                | {"--placement-steps": "1", "--final-steps": "1", "--final-learning-rate": "0.001"},
            ),
        ]

    def files(self) -> dict[str, tuple[int, int]]:
        found = (path for path in self.root.rglob("*"))
        return {str(path): (stat.st_size, stat.st_mtime_ns) for path in found for stat in [path.lstat()]}


def mutated(line: tuple[list[str], dict], draw: random.Random) -> list[str]:
    """A command line with one or a few things wrong."""
    command, options = line[0], [[name, None if value is None else str(value)] for name, value in line[1].items()]
    stray: list[str] = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind = draw.random()
        if kind < 0.7 and options:
            draw.choice(options)[1] = draw.choice(draw.choice((VALUES, NUMBERS)))
        elif kind < 0.78 and options:
            options.pop(draw.randrange(len(options)))
        elif kind < 0.86 and options:
            options.append([draw.choice(options)[0], draw.choice(VALUES)])
        elif kind < 0.92 and options:
            draw.choice(options)[1] = None
        else:
            stray.append(draw.choice(WORDS))
    words = [word for name, value in options for word in ([name] if value is None else [name, value])]
    at = draw.randrange(len(words) + 1)
    return [*command, *words[:at], *stray, *words[at:]]


def _ran(*args, **options):
    raise Ran


@contextmanager
def light():
    """Heavy work ends the command; what is light is done, on little."""
    complete, measure, random_model = (
        JetNemotronForCausalLM.generate,
        throughput.measure_speed,
        JetNemotronForCausalLM.random.__func__,
    )

    def short(self, ids, mask=None, new=128, **options):
        return complete(self, ids, mask, min(new, 3), **options)

    def quick(model, B, T, new, repeats, **options):
        return measure(model, min(B, 2), min(T, 8), min(new, 2), 1, **options)

    def small(cls, config, **options):
        return _ran() if config.vocab_size * config.hidden_size > 10**6 else random_model(cls, config, **options)

    stages = [kind for _, _, kind in search.stages().values() if kind is not Pipeline]
    with contextlib.ExitStack() as stack:
        for owner, name, value in [
            (JetNemotronForCausalLM, "generate", short),
            (JetNemotronForCausalLM, "random", classmethod(small)),
            (throughput, "measure_speed", quick),
            (throughput.against, "measure", _ran),
            (demo.TextCorpus, "from_standard_library", _ran),
            *((stage, "run", _ran) for stage in stages),
        ]:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def outcome(argv: list[str], world: World, stdin: bytes = b"def f") -> tuple[str, str]:
    """(what happened, details): "ran", "refused", or what is wrong."""
    before = world.files()
    out, err = io.StringIO(), io.StringIO()
    here = os.getcwd()
    os.chdir(world.cwd)
    try:
        with (
            light(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        ):
            code = main(argv)
    except Ran:
        code = 0
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    finally:
        os.chdir(here)
    lines = err.getvalue().splitlines()
    if "Ran" in err.getvalue():
        code = 0
    elif "unexpected" in err.getvalue() or "Traceback" in err.getvalue():
        return "traceback", err.getvalue()[-500:]
    if world.files() != before:
        return "written", str(sorted(set(world.files()) ^ set(before)))
    if code == 0:
        return "ran", ""
    last = lines[-1] if lines else ""
    if code not in (1, 2) or not last.startswith("jetkernels") or len(last) < 25 or len(last) > 2000:
        return "no sentence", f"{code}: {last[:300]!r}"
    return "refused", last


def drive(world: World, refused: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Until so many command lines were refused: counts of outcomes, and what was wrong."""
    draw = random.Random(seed)
    counts: Counter = Counter()
    wrong = []
    while counts["refused"] < refused:
        argv = mutated(draw.choice(world.lines), draw)
        stdin = draw.choice((b"def f", b"", b"\xff\xfe", b"a" * 100_000, "é".encode()))
        what, details = outcome(argv, world, stdin)
        counts[what] += 1
        if what not in ("ran", "refused"):
            wrong.append(f"{what}: {[word[:60] for word in argv]}: {details}")
    return counts, wrong


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found, faults = drive(World(Path(folder)), int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(dict(found))
    print("\n".join(faults))
    sys.exit(bool(faults))
