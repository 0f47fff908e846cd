"""Hooks of mkdocs: the pages that lie beside docs/, and links between them and those in it."""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("backends", "distributions", "evaluation", "forecasters")
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples/README.md",
}


def on_startup(**_: object) -> None:
    """Give the folders the names that they are installed by, for the API's pages."""
    packages = ROOT / "build" / "packages" / "moecast"
    packages.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        link = packages / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(ROOT / name, packages))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README, CONTRIBUTING and CHANGELOG as pages, and the notebooks as files."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        content = notebook.read_text(encoding="utf-8")
        files.append(File.generated(config, f"notebooks/{notebook.name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links out of docs/ lead to where those pages are on the site."""
    return re.sub(r"\]\(\.\./((?:notebooks|examples)/|README)", _on_site, markdown)


def _on_site(link: "re.Match[str]") -> str:
    return "](index" if link[1] == "README" else f"]({link[1]}"
