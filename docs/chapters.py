"""What nbdev's directives and a notebook's links mean on a page of the book."""

import json
import os
import re
from collections import defaultdict
from pathlib import Path

import nbformat

from sparse_nb._modidx import d

ROOT = Path(__file__).parent.parent
DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*\|[ \t]*(\w+).*\n?", re.MULTILINE)
CODE = re.compile(r"(?<![`\w{}\[])`([A-Za-z_][\w.]*)`(?![`\]])")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
HTML_LINK = re.compile(r'(?:(?<= href=")|(?<=<iframe src="))(?![a-z]+:|#)([^"#]+)(#[^"]*)?(?=")')


def _names():
    """{what prose may call it: full names} of every public module, function, class and method of the package."""
    names = defaultdict(set)
    for module, members in d["syms"].items():
        for name in (module, *members):
            parts = name.split(".")
            if not any(part.startswith("_") for part in parts):
                for i in range(1, len(parts)):
                    names[".".join(parts[i:])].add(name)
                names[name].add(name)
    return names


NAMES = _names()


def _reference(match, module):
    """`masks.random_masks` as a link to the reference, where the name means one thing; as it is otherwise."""
    found = NAMES.get(match[1], set())
    found = {name for name in found if module and name.startswith(f"sparse_nb.{module}.")} or found
    return f"{{py:obj}}`{match[1]} <{min(found)}>`" if len(found) == 1 else match[0]


def with_references(text, module=None):
    """Markdown `text` with names of the package linked, outside of headings and fenced code. module: of the chapter."""
    fenced, lines = False, []
    for line in text.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        plain = fenced or line.startswith("#") or line.lstrip().startswith("```")
        lines.append(line if plain else CODE.sub(lambda match: _reference(match, module), line))
    return "\n".join(lines)


def _target(link, folder, suffix):
    """Where a relative `link` of a file in `folder` leads in the book: a page, a file beside it, or the repository."""
    path = os.path.normpath(os.path.join(folder, link[1]))
    if path == "nbs/explore.ipynb":
        return os.path.relpath(f"docs/explorer{suffix}", folder)
    if path.startswith("docs/static/"):
        return os.path.relpath(path.replace("docs/static", "_static"), folder)
    if path.endswith(".ipynb"):
        return link[1].removesuffix(".ipynb") + (suffix or ".ipynb") + (link[2] or "")
    of_book = path.startswith(("figures/rendered/", "docs/", "CHANGELOG", "CONTRIBUTING"))
    if not (ROOT / path).exists() or of_book and not (ROOT / path).is_dir():
        return link[0]
    from conf import branch, repository

    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"https://github.com/{repository}/{kind}/{branch}/{path}"


def with_links(text, folder, suffix=""):
    """Markdown or HTML `text` of a file in `folder`, with links that hold in the book.

    suffix: of pages in Markdown; ".html" where Sphinx does not resolve them, as in outputs.
    """
    text = LINK.sub(lambda link: _target(link, folder, suffix), text)
    return HTML_LINK.sub(lambda link: _target(link, folder, ".html"), text)


def _is_progress(output):
    """Whether a stored output is a progress bar, of which a page would show every step."""
    return output.get("name") == "stderr" and bool(re.search(r"%\||\[\d+:\d\d[,<]", output.text))


def read(text):
    """A notebook as the book shows it, for myst-nb."""
    notebook = nbformat.reads(text, as_version=4)
    folder = notebook.metadata.get("folder", "nbs/x")
    module = next((m[1] for c in notebook.cells if (m := re.search(r"\|\s*default_exp\s+([\w.]+)", c.source))), None)
    for cell in notebook.cells:
        tags = cell.metadata.setdefault("tags", [])
        if cell.cell_type == "markdown":
            cell.source = with_references(with_links(cell.source, folder), module)
            continue
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_progress(output)]
        for output in cell.get("outputs", ()):
            for kind in {"text/html", "text/markdown"} & set(output.get("data", {})):
                output.data[kind] = with_links(output.data[kind], folder, ".html")
        said = {match[1] for match in DIRECTIVE.finditer(cell.source)}
        cell.source = DIRECTIVE.sub("", cell.source)
        if said & {"hide", "default_exp"} or not cell.source.strip():
            tags.append("remove-cell")
        if "hide_input" in tags:
            tags.append("remove-input")
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def slug(title):
    """The anchor that JupyterLab gives to a heading."""
    return re.sub(r"\s", "-", title)


def link_page(app, name, content):
    """Before a page is parsed: names and links in Markdown; a notebook is told its folder, which `read` needs."""
    folder = os.path.dirname(name)
    if str(app.env.doc2path(name)).endswith(".ipynb"):
        notebook = json.loads(content[0])
        notebook["metadata"]["folder"] = folder
        content[0] = json.dumps(notebook)
    elif not name.startswith("reference/"):
        content[0] = with_references(with_links(content[0], folder))
