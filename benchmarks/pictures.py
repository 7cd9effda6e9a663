"""Draw the pictures of README.md: `python -m benchmarks.pictures` writes them to docs/images.

What they show is committed: what the two commands printed (docs/images/demo.txt, parts left out are marked [...]), and
measured times.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

from benchmarks.report import write_text

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
TIMES = ROOT / "benchmarks" / "results" / "cpu" / "2026-11-24-2768d41.json"
SHAPE = "2b"
# op of the file, what it is called here, the peer of the file, what that is.
BARS = (
    ("chunk_gated_delta_rule 1x2048", "chunk_gated_delta_rule", "transformers", "transformers"),
    ("chunk_gated_delta_rule_backward 1x2048", "its backward", "transformers", "autograd of the same"),
    ("recurrent_gated_delta_rule 8x1", "recurrent_gated_delta_rule_", "transformers", "transformers"),
    ("dynamic_conv 1x2048", "dynamic_conv", "unfused torch", "torch, taps stored"),
    ("dynamic_conv_backward 1x2048", "its backward", "unfused torch", "autograd of the same"),
    ("dynamic_conv_step 8", "dynamic_conv_step_", "generator GEMM", "torch, product of the taps alone"),
)
COLOURS = {"fp32": "#4477aa", "bf16": "#cc6677"}

WIDTH, LINE, COLUMNS = 880, 17, 112  # of a terminal: pixels, pixels, characters
MONO = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
SANS = "system-ui, 'DejaVu Sans', Arial, sans-serif"


def svg(width: int, height: int, family: str, parts: Iterable[str]) -> str:
    """A picture on a white ground, so that it can be read on a dark page too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    ground = f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff" stroke="#cccccc"/>'
    return "\n".join([f'{head} font-family="{family}">', ground, *parts, "</svg>"]) + "\n"


def label(x: float, y: float, content: str, size: float = 13, fill: str = "#222222", more: str = "") -> str:
    """A line of text whose spaces count."""
    style = f'font-size="{size:g}" fill="{fill}" xml:space="preserve"{more}'
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(content)}</text>'


def terminal(text: str) -> str:
    """What a program printed; lines that begin with $ are what was typed."""
    lines = [
        part
        for line in text.rstrip("\n").split("\n")
        for part in (wrap(line, COLUMNS, subsequent_indent="    ", drop_whitespace=False) or [""])
    ]
    parts = []
    for i, line in enumerate(lines):
        typed, cut = line.startswith("$ "), line == "[...]"
        fill = "#0b5394" if typed else "#999999" if cut else "#222222"
        parts.append(label(16, 28 + LINE * i, line, 12.5, fill, ' font-weight="bold"' if typed else ""))
    return svg(WIDTH, 28 + LINE * len(lines), MONO, parts)


def speed_ups(results: dict) -> dict[tuple[str, str], float]:
    """(op, dtype) -> the peer's median time over ours, of the ops of BARS at SHAPE."""
    peers = {op: peer for op, _, peer, _ in BARS}
    found = {}
    for row in results["rows"]:
        if row["shape"]["name"] == SHAPE and row["op"] in peers:
            seconds = {name: times["median"] for name, times in row["seconds"].items()}
            found[row["op"], row["dtype"]] = seconds[peers[row["op"]]] / seconds["jetkernels"]
    return found


def chart(results: dict) -> str:
    """A bar for each op and dtype, and where both would be as fast."""
    found, facts = speed_ups(results), results["provenance"]
    left, top, row, bar = 380, 62, 44, 15
    scale = (WIDTH - left - 70) / max(found.values())
    bottom = top + row * len(BARS)
    parts = [label(16, 28, "Times faster than the peer, on a CPU (the peer's time over ours)", 16)]
    for i, (dtype, colour) in enumerate(COLOURS.items()):
        parts += [
            f'<rect x="{WIDTH - 150 + 70 * i}" y="17" width="12" height="12" fill="{colour}"/>',
            label(WIDTH - 133 + 70 * i, 28, dtype),
        ]
    for i, (op, name, _, peer) in enumerate(BARS):
        y = top + row * i
        parts += [label(16, y + 13, name, 14), label(16, y + 29, f"against {peer}", 12, "#666666")]
        for j, (dtype, colour) in enumerate(COLOURS.items()):
            ratio, at = found[op, dtype], y + (bar + 2) * j
            parts += [
                f'<rect x="{left}" y="{at}" width="{scale * ratio:.1f}" height="{bar}" fill="{colour}"/>',
                label(left + scale * ratio + 6, at + 12, f"{ratio:.1f}x", 12),
            ]
    one = f"{left + scale:.1f}"
    parts += [
        f'<line x1="{one}" y1="{top - 8}" x2="{one}" y2="{bottom}" stroke="#222222" stroke-dasharray="3 3"/>',
        label(left + scale - 5, top - 12, "1x", 12),
        label(16, bottom + 18, source(facts), 12, "#666666"),
    ]
    return svg(WIDTH, bottom + 34, SANS, parts)


def source(facts: dict) -> str:
    """Where the times come from."""
    machine = f"{facts['threads']} cores of an {facts['device']} ({facts['build']['cpu_isa']})"
    torch = facts["torch"].partition("+")[0]
    file = TIMES.relative_to(ROOT)
    return f"{machine}, torch {torch}, shape of the 2B model, commit {facts['commit']}: {file}"


def pictures() -> dict[str, str]:
    """Name of the file -> its content."""
    return {
        "demo.svg": terminal((IMAGES / "demo.txt").read_text()),
        "speed.svg": chart(json.loads(TIMES.read_text())),
    }


def main() -> None:
    """Writes them."""
    for name, content in pictures().items():
        write_text(IMAGES / name, content)
        print(IMAGES / name)


if __name__ == "__main__":
    main()
