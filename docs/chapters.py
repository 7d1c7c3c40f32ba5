"""What nbdev's directives and a notebook's links mean on a page of the book."""

import ast
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


def _is_all(node):
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"


def _described(module):
    """(the names that `module` has in the reference, the chapter that it is exported from), read from its text."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    listed = (node for node in ast.parse(text).body if _is_all(node))
    chapter = re.search(r"File to edit: (.*\.ipynb)", text)
    return (
        {name for node in listed for name in ast.literal_eval(node.value)},
        chapter and os.path.normpath(path.parent.relative_to(ROOT) / chapter[1]),
    )


MODULES = {module: _described(module) for module in d["syms"]}
REFERENCE = {module for module, (listed, _) in MODULES.items() if listed}


def _names():
    """{what prose may call it: full names} of every module, function, class and method without an underscore, and
    {full name: chapter} of those that only other chapters use, which have no place in the reference."""
    names, chapters = defaultdict(set), {}
    for module, members in d["syms"].items():
        listed, chapter = MODULES[module]
        for name in (module, *members):
            parts = name.split(".")
            if any(part.startswith("_") for part in parts):
                continue
            for i in range(1, len(parts)):
                names[".".join(parts[i:])].add(name)
            names[name].add(name)
            if not (listed if name == module else name.removeprefix(f"{module}.").split(".")[0] in listed):
                chapters[name] = chapter
    return names, chapters


NAMES, CHAPTERS = _names()


def _reference(match, module):
    """`masks.random_masks` as a link to the reference, or to the chapter of what the reference has not, where the name
    means one thing; as it is otherwise, and in its own chapter."""
    found = NAMES.get(match[1], set())
    found = {name for name in found if module and name.startswith(f"sparse_nb.{module}.")} or found
    if len(found) != 1:
        return match[0]
    (name,) = found
    if name not in CHAPTERS:
        return f"{{py:obj}}`{match[1]} <{name}>`"
    home = MODULES.get(f"sparse_nb.{module}", (set(), None))[1]
    if CHAPTERS[name] in (None, home):
        return match[0]
    return f"[{match[0]}](/{CHAPTERS[name]})"


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
