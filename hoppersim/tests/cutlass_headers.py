"""The instruction wrappers in CUTLASS's headers: every function, and the asm statements in it, found in the text of the
headers.

A wrapper is known by its qualified name without the namespaces, e.g. ``SM90_TMA_LOAD_2D::PREFETCH::copy``.
"""

import functools
import re
from dataclasses import dataclass, field

from cutlass_kernels import cutlass_source

_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_NOT_A_NAME = {
    "if",
    "for",
    "while",
    "switch",
    "asm",
    "alignas",
    "static_assert",
    "sizeof",
    "defined",
    "decltype",
    "noexcept",
    "__attribute__",
    "do",
    "else",
    "deprecated",
    "constexpr",
    "rank",
}
_ESCAPES = {"\\n": "\n", "\\t": "\t", '\\"': '"'}


@dataclass(frozen=True)
class Asm:
    """One asm statement: its text with %0, %1, …, and each operand's constraint and C++ expression."""

    text: str
    operands: tuple[tuple[str, str], ...]


@dataclass
class Function:
    name: str
    header: str
    asm: list[Asm] = field(default_factory=list)
    body: str = ""


def _blanked(text: str) -> str:
    """The text with comments, strings and preprocessor lines replaced by spaces, so that every brace in it counts."""

    def spaces(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    pattern = r'//[^\n]*|/\*.*?\*/|"(?:[^"\\]|\\.)*"|\'(?:[^\'\\\n]|\\.)\'|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*'
    return re.sub(pattern, spaces, text, flags=re.S | re.M)


def _split(text: str, blanked: str, separator: str) -> list[str]:
    """Splits where the separator stands outside of brackets and strings."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(blanked):
        depth += (c in "([{") - (c in ")]}")
        if c == separator and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return parts + [text[begin:]]


def _unescaped(template: str) -> str:
    text = "".join(_STRING.findall(template))
    return re.sub(r'\\[nt"]', lambda match: _ESCAPES[match[0]], text)


def _asm_statements(text: str, blanked: str) -> list[Asm]:
    statements = []
    for match in re.finditer(r"\basm\s*(?:volatile|__volatile__)?\s*\(", blanked):
        depth, end = 1, match.end()
        while depth:
            depth += (blanked[end] == "(") - (blanked[end] == ")")
            end += 1
        inner, inner_blanked = text[match.end() : end - 1], blanked[match.end() : end - 1]
        sections = _split(inner, inner_blanked, ":")
        operands = []
        for section in sections[1:3]:
            for part in _split(section, _blanked(section), ","):
                if found := re.match(r'\s*"([=+]?\w)"\s*\((.*)\)\s*$', part, re.S):
                    operands.append((found[1], " ".join(found[2].split())))
        statements.append(Asm(_unescaped(sections[0]), tuple(operands)))
    return statements


def _scope_of(head: str) -> tuple[str, str] | None:
    """What a brace opens, from the text before it: ("namespace" | "struct" | "function", name)."""
    head = re.sub(
        r"template\s*<.*?>\s*(?=(?:template|struct|class|CUTE|CUTLASS|static|inline|constexpr|void|auto|uint|int|using|friend)\b)",
        "",
        head,
        flags=re.S,
    )
    if match := re.search(r"\bnamespace\b\s*([\w:]*)\s*$", head):
        return "namespace", match[1]
    if match := re.search(r"\b(?:struct|class|union)\s+(?:alignas\([^)]*\)\s*)?(\w+)[^()]*$", head):
        return "struct", match[1]
    if "(" in head and "=" not in head.split("(")[0]:
        names = [n for n in re.findall(r"(operator\s*\S+|~?\w+)\s*\(", head) if n not in _NOT_A_NAME]
        if names:
            return "function", names[0]
    return None


def functions(header: str) -> list[Function]:
    """The functions of a header, overloads one by one, in order. ``header``: path below CUTLASS's include folder."""
    text = (cutlass_source() / "include" / header).read_text()
    blanked = _blanked(text)
    result, scopes, start, inside = [], [], 0, None
    for match in re.finditer(r"[{};]", blanked):
        if match[0] == "{":
            scope = None if inside else _scope_of(blanked[start : match.start()])
            scopes.append(scope)
            if scope and scope[0] == "function":
                name = "::".join([s[1] for s in scopes if s and s[0] == "struct"] + [scope[1]])
                inside = (len(scopes), match.end(), Function(name, header))
        elif match[0] == "}":
            if inside and inside[0] == len(scopes):
                begin, function = inside[1], inside[2]
                function.body = blanked[begin : match.start()]
                function.asm = _asm_statements(text[begin : match.start()], function.body)
                result.append(function)
                inside = None
            scopes.pop()
        if not inside:
            start = match.end()
    return result


@functools.cache
def wrappers(*headers: str) -> list[Function]:
    return [function for header in headers for function in functions(header)]
