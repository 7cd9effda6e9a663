"""How Sphinx makes the site of the Markdown files here and of the docstrings; `python3 dev.py docs` runs it.

The front page is README.md. A link that leads out of docs/ leads to the repository on the web.
"""

import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

from jetkernels import __version__

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Homepage"]

project = PROJECT["name"]
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
smartquotes = False  # T' is a symbol
highlight_language = "text"  # of blocks that name none: equations, commands

python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "extra_repr"}
autosummary_generate = False
napoleon_use_ivar = True  # else a field of a NamedTuple is described twice
default_role = "py:obj"  # a name in single backticks leads to it, if it is on the site
nitpicky = True  # a :func: that leads nowhere is a warning
# Types, most of which are PyTorch's, and words in single backticks that are no names.
nitpick_ignore_regex = [("py:class", r".*"), ("py:obj", r".*")]

html_theme = "alabaster"
html_title = "jetkernels"
html_theme_options = {
    "description": PROJECT["description"],
    "page_width": "1280px",
    "sidebar_width": "240px",
    "fixed_sidebar": True,
    "font_family": "system-ui, sans-serif",
    "head_font_family": "system-ui, sans-serif",
    "sidebar_collapse": True,
    "show_powered_by": False,
}
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False


def for_the_site(markdown: str, folder: Path) -> str:
    """A file of `folder` with the links that it needs as a page."""

    def link(match: re.Match) -> str:
        path, mark, anchor = match[1].partition("#")
        target = (folder / path).resolve()
        if not path or ":" in path or not target.exists():
            return match[0]
        if target.is_relative_to(DOCS):
            page = f"/{target.relative_to(DOCS)}"  # from docs/, whatever page the link is on
        else:
            page = f"{REPOSITORY}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT)}"
        return f"]({page}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", link, markdown)


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Puts README.md in front of the table of contents, and turns links."""
    source[0] = for_the_site(source[0], Path(app.env.doc2path(name)).parent)
    if name == "index":
        source[0] = for_the_site((ROOT / "README.md").read_text(), ROOT) + source[0]


def read_docstring(app: Sphinx, what: str, name: str, described: object, options: object, lines: list[str]) -> None:
    """Makes a section of results in one line; a symbol that ends a line, as in "channels: D.", begins no list.

    What stands before a colon in the first line of a property is no type.
    """
    text = re.sub(r"^Returns: (?=.)", "Returns:\n    ", "\n".join(lines), flags=re.MULTILINE)
    lines[:] = re.sub(r"(^|: )([A-Z])\.$", r"\1\2\\.", text, flags=re.MULTILINE).split("\n")
    if what == "property":
        lines.insert(0, "")


def setup(app: Sphinx) -> None:
    """Is called by Sphinx."""
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon
    app.connect("source-read", read_page)
