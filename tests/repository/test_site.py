"""The site (docs/conf.py) is built without a warning, holds every public name, and its links lead somewhere."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support.documents import PAGES
from support.paths import ROOT

import dev
import jetkernels
from jetkernels import integrations, model, modules

pytest.importorskip("sphinx", reason="needs the package sphinx, of requirements.txt")
pytest.importorskip("myst_parser", reason="needs the package myst-parser, of requirements.txt")
hf = pytest.importorskip("jetkernels.hf", reason="needs the package transformers, of requirements.txt")


class Page(HTMLParser):
    """What a page has: anchors, and links to other places."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.anchors, self.links = path, {""}, set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)

    def targets(self) -> set[tuple[Path, str]]:
        """File and anchor of each link that stays on the site."""
        found = set()
        for link in self.links:
            parts = urlsplit(link)
            if not parts.scheme and not parts.netloc:
                path = self.path if not parts.path else (self.path.parent / unquote(parts.path)).resolve()
                found.add((path, unquote(parts.fragment)))
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    """The pages by their paths."""
    folder = tmp_path_factory.mktemp("site")
    _, *command = dev.BUILD_SITE
    done = subprocess.run([sys.executable, *command, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-5000:]
    return {path: Page(path) for path in folder.rglob("*.html")}


def test_links_lead_somewhere(site):
    lost = [
        f"{page.path.name}: {path.name}#{anchor}"
        for page in site.values()
        for path, anchor in page.targets()
        if not path.exists() or (path in site and anchor not in site[path].anchors)
    ]
    assert len(site) > 10 and not lost


def test_every_page_is_reached_from_the_first(site):
    (first,) = [path for path in site if path.name == "index.html" and path.parent.name.startswith("site")]
    reached, new = set(), {first}
    while new:
        reached |= new
        new = {path for known in new for path, _ in site[known].targets() if path in site} - reached
    wanted = {first.parent / Path(name).relative_to("docs").with_suffix(".html") for name in PAGES}
    assert wanted <= reached


@pytest.mark.parametrize("module", [jetkernels, modules, model, hf, integrations], ids=lambda module: module.__name__)
def test_every_public_name_is_described(site, module):
    described = set().union(*(page.anchors for page in site.values()))
    public = {f"{module.__name__}.{name}" for name in module.__all__ if name != "__version__"}
    assert public and public <= described, public - described
