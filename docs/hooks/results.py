"""The results of the studies in `recipes/`, each a page of the site, and their list on the page `results.md`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PLACE = "<!-- results -->"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|#)([^)]*)\)")
PICTURES = (".png", ".svg")
# A picture of a study, as a page beside the folder of recipes links to it in the repository.
PICTURE = re.compile(r"\]\(\.\./recipes/(\w+/[^)/]+\.(?:png|svg))\)")


def studies(root: Path) -> list[Path]:
    """The folders of studies that have written results."""
    return sorted(path.parent for path in root.glob("recipes/*/results.md"))


def title_of(folder: Path) -> str:
    """The first heading of a study's README, or of its results."""
    page = next(path for name in ("README.md", "results.md") if (path := folder / name).is_file())
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip().removesuffix(": results")


def page_of(folder: Path) -> str:
    """What a study is about and what it found, as one page."""
    there = [path for name in ("README.md", "results.md") if (path := folder / name).is_file()]
    parts = [path.read_text(encoding="utf-8") for path in there]
    text = "\n\n".join([parts[0], *(re.sub(r"^# .*\n", "## What it wrote\n", part, count=1) for part in parts[1:])])
    shown = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICTURES and path.name not in text]
    text += "".join(f"\n\n![{Path(name).stem}]({folder.name}/{name})" for name in shown)
    # Pictures are beside the page in the repository, and in a folder of the study's name here.
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?://)([^)/]+\))", rf"\1{folder.name}/\2", text)
    return LINK.sub(lambda link: _linked(link, folder), text)


def _linked(link: re.Match[str], folder: Path) -> str:
    """A link to another study leads to its page; other files of the repository are not on the site, and are named."""
    target = (folder / link[2]).resolve()
    if target in studies(folder.parents[1]):
        return f"[{link[1]}]({target.name}.md)"
    return f"{link[1]} (`{link[2]}`)"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page and the pictures of every study."""
    root = Path(config.config_file_path).parent
    for folder in studies(root):
        files.append(File.generated(config, f"results/{folder.name}.md", content=page_of(folder)))
        for path in sorted(folder.iterdir()):
            if path.suffix in PICTURES:
                uri = f"results/{folder.name}/{path.name}"
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Let pictures of studies lead to where the site has them, and write the list of studies into its place."""
    markdown = PICTURE.sub(r"](results/\1)", markdown)
    if page.file.src_uri != "results.md":
        return markdown
    if PLACE not in markdown:
        raise ValueError(f"results.md keeps no place for the list of studies: write {PLACE}")
    root = Path(config.config_file_path).parent
    lines = [f"- [{title_of(folder)}](results/{folder.name}.md)" for folder in studies(root)]
    return markdown.replace(PLACE, "\n".join(lines))
