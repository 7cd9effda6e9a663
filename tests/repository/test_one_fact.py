"""One fact, one place: what the product writes down more than once is counted."""

import ast
import re
from functools import cache
from pathlib import Path

from support.paths import ROOT

PRODUCT = ("csrc", "bindings", "jetkernels")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh")


def sources() -> list[Path]:
    return sorted(p for folder in PRODUCT for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES)


def python_code(text: str) -> str:
    """Without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(body, list) and body and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                    body[0] = ast.Pass()
    return ast.unparse(tree)


@cache
def code_of(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".py":
        return python_code(text)
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


def argument_lists(text: str, names: tuple[str, ...]) -> int:
    """How often ``names`` stand one after the other, as arguments, fields or a tuple, with or without their types.

    ``const Tensor& q, const Tensor& k``, ``Tensor q, Tensor k``, ``q: Tensor, k: Tensor``, ``a.q, a.k``,
    ``float *q, *k`` and ``{"q", q}, {"k", k}`` are such lists.
    """
    text = re.sub(r"""["'{}&*]""", " ", text)
    text = re.sub(r"\(a!\)|\bconst\b|\b(?:Token)?Tensor\b|\b(?:float|void)\b", " ", text)
    text = re.sub(r"\w+(?:\.|->)(?=\w)", "", text)  # of whom it is a field
    text = re.sub(r"[\s:]*[,;\n][\s,;:]*", ",", text)
    one = "".join(rf"(?<![\w]){name}\s*,\s*(?:{name}\s*,\s*)?" for name in names[:-1])
    return len(re.findall(rf"{one}{names[-1]}\b", text))


def places(names: tuple[str, ...], without: str | None = None) -> dict[str, int]:
    """How many lists each file of the product has, but for files with ``without`` in their path."""
    counts = {str(p.relative_to(ROOT)): argument_lists(code_of(p), names) for p in sources()}
    return {path: n for path, n in counts.items() if n and (without is None or without not in path)}


def test_what_counts_as_a_list():
    assert argument_lists("f(const Tensor& q, const Tensor& k,\n  const Tensor& v)", ("q", "k", "v")) == 1
    assert argument_lists("def f(q: Tensor, k: Tensor, v: Tensor=3): g(q, k, v)", ("q", "k", "v")) == 2
    assert argument_lists('{"q", q}, {"k", k}, {"v", v}', ("q", "k", "v")) == 1
    assert argument_lists("struct { const float *q, *k; TokenTensor v; }; q = k; v", ("q", "k", "v")) == 1
    assert argument_lists("class A:\n    q: Tensor\n    k: Tensor\n    v: Tensor\n", ("q", "k", "v")) == 1
    assert argument_lists("return (a.q, a.k, a.v), (p->q, p->k, p->v)", ("q", "k", "v")) == 2
    assert argument_lists("(dq, dk, dv), (q, v, k), (q, k, w, v)", ("q", "k", "v")) == 0


def test_the_arguments_of_the_chunked_rule_are_listed_in_few_places():
    """Those of the chunked gated delta rule, its backward and the one on a pool, and where other code calls them."""
    found = places(("q", "k", "v", "g", "beta"), without="recurrent")
    assert sum(found.values()) <= 19, found


def test_the_arguments_of_both_rules_are_listed_in_few_places():
    found = places(("q", "k", "v", "g", "beta"))
    assert sum(found.values()) <= 32, found
