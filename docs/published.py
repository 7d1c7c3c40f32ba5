"""Figures and tables of the book, from what is published in figures/rendered: drawn by the package's own code."""

import ast
import html
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import nbformat
from sphinx.util import logging
from values import ROOT, folder_of, module, pooled_effects, published_rows

logger = logging.getLogger(__name__)


def notebook_of(name):
    """The notebook that draws a figure, by its name such as fig01 or claims."""
    (path,) = (ROOT / "figures").glob(f"{name}*.ipynb")
    return nbformat.read(path, as_version=4)


def _statements(notebook):
    """The statements of a notebook's code cells, and of its loops and conditions, but for its parameters."""
    cells = (c for c in notebook.cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", ()))
    statements = [statement for cell in cells for statement in ast.parse(cell.source).body]
    return [
        inner for outer in statements for inner in (outer.body if isinstance(outer, (ast.For, ast.If)) else [outer])
    ]


def _assigned(statements):
    """{name: the expression that it is assigned}."""
    assignments = (s for s in statements if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name))
    return {statement.targets[0].id: statement.value for statement in assignments}


def drawing_calls(name):
    """{name of the published files: the call that draws them} of a figure's notebook, from its calls of `publish`; of a
    `part`, for each allocation rule. Only files that are there."""
    statements, drawn = _statements(notebook_of(name)), {}
    assigned = _assigned(statements)
    for statement in statements:
        call = getattr(statement, "value", None)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "display":
            call = call.args[0]
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "publish":
            first = call.args[2].value if len(call.args) > 2 else name
            rules = ("water_filling", "proportional", "erk") if call.func.value.id == "part" else ()
            names = (first, *(f"{first}_{rule}" for rule in rules))
            drawn |= dict.fromkeys(names, assigned[call.args[0].id])
    return {
        published: call for published, call in drawn.items() if (folder_of(published) / f"{published}.svg").exists()
    }


def said_by(name):
    """(title, lines of the footer) of a published figure, read from its SVG."""
    texts = ElementTree.parse(folder_of(name) / f"{name}.svg").iter("{http://www.w3.org/2000/svg}text")
    title, footer = "", []
    for text in texts:
        if text.get("class") == "gtitle":
            title = "".join(text.itertext())
        elif "font-size: 10px" in text.get("style", "") and text.get("class") == "annotation-text":
            for line in ["".join(line.itertext()) for line in text] or ["".join(text.itertext())]:
                if footer and not footer[-1].endswith("."):  # wrapped there
                    footer[-1] += f" {line}"
                else:
                    footer.append(line)
    return title, footer


def _imported(statement):
    """{name: object} of a statement such as `from sparse_nb.results import plots`."""
    where, found = statement.module.removeprefix("sparse_nb").removeprefix("."), {}
    for alias in statement.names:
        try:
            found[alias.name] = getattr(module(where), alias.name)
        except AttributeError:  # a module of a part
            found[alias.name] = module(f"{where}.{alias.name}")
    return found


def _value(node, scope, assigned):
    """The value of an expression; names that `scope` lacks get it from their assignments in the notebook."""
    for name in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - set(scope):
        scope[name] = _value(assigned[name], scope, assigned)
    return eval(compile(ast.fix_missing_locations(ast.Expression(node)), "<notebook>", "eval"), scope)


def draw(name):
    """{name of the published files: plotly figure} of a figure's notebook: its own calls on the published rows. Title
    and footer are left to the page."""
    statements, figures = _statements(notebook_of(name)), {}
    for published, call in drawing_calls(name).items():
        rows = published_rows(published)
        scope = dict.fromkeys(("curves", "found", "judged", "increases"), rows)
        scope["part"] = SimpleNamespace(rule=rows.rule.dropna().iloc[0]) if "rule" in rows else None
        if published.startswith("fig03"):  # chosen from all radii, of which the published rows have the chosen ones
            scope["radii"] = rows[rows.strength > 0].groupby("dataset").strength.max().to_dict()
        for statement in statements:
            if isinstance(statement, ast.ImportFrom) and statement.module.startswith("sparse_nb."):
                scope |= _imported(statement)
        ours = {"title": ast.Constant(""), "footer": ast.List([], ast.Load())}
        keywords = [ast.keyword(k.arg, ours.get(k.arg, k.value)) for k in call.keywords]
        figures[published] = _value(ast.Call(call.func, call.args, keywords), scope, _assigned(statements))
    return figures


def _interactive(figure, name):
    """A figure as HTML for figures.js: as wide as the page, but not narrower than can be read."""
    layout = figure.layout
    height, width = int(layout.height) - 35, min(int(layout.width), 720)
    layout.width, layout.height, layout.margin.t, layout.margin.b = None, None, 45, 60
    layout.margin.r = (layout.margin.r or 80) + 30  # the fonts of a reader may be wider than those of the SVG
    data = figure.to_json().replace("</", "<\\/")  # which would end the script
    return (
        f'<div class="plot" data-plot="{name}" style="height: {height}px; min-width: {width}px"></div>'
        f'<script type="application/json" id="{name}">{data}</script>'
    )


def _shown(name):
    """The cells of a page that show what is published of a figure: each plot, with what is said under it."""
    try:
        figures = draw(name)
    except Exception as error:  # the drawing code has changed: its published picture is true all the same
        logger.warning("%s is shown as a picture, since it cannot be drawn here: %r", name, error)
        figures = {}
    if not drawing_calls(name):
        yield nbformat.v4.new_markdown_cell(
            f"No runs of this figure are published yet. `sparse-nb figures {name}` draws it from digits, in minutes."
        )
    for published in drawing_calls(name):
        title, footer = said_by(published)
        preset = folder_of(published).name
        picture = f'<img src="rendered/{preset}/{published}.svg" alt="{html.escape(title)}">'
        plot = _interactive(figures[published], published) if published in figures else picture
        said = "".join(f"<p>{html.escape(line)}</p>" for line in footer)
        frame = f'<div class="frame" tabindex="0" role="region" aria-label="{html.escape(title)}">{plot}</div>{said}'
        output = nbformat.v4.new_output("display_data", {"text/html": f'<div class="figure">{frame}</div>'})
        yield nbformat.v4.new_markdown_cell(
            f"Preset `{preset}`. Point at a mark for its value, its interval and the hashes of its runs; a click on "
            f"the legend hides a line. [Vector graphic](rendered/{preset}/{published}.svg), "
            f"[every point with its runs](rendered/{preset}/{published}.csv); "
            f"`sparse-nb trace figures/rendered/{preset}/{published}.svg` lists runs, code and data."
        )
        yield nbformat.v4.new_code_cell("shown", outputs=[output], metadata={"tags": ["remove-input"]})


def _judged(figure):
    """What the paper says of a figure and whether it holds, as Markdown; empty if no claim is tested on it."""
    verdicts, claims = module("claims.verdicts"), module("claims.claims").CLAIMS
    of_figure = [claim for claim in claims.values() if figure in claim.figures]
    if not of_figure:
        return ""
    table = verdicts.as_markdown(verdicts.claims_table(published_rows("claims"), of_figure, pooled=pooled_effects()))
    note = (
        "Verdicts are [explained here](../nbs/8_claims/06_verdicts.ipynb); all of them are on [one page](claims.ipynb)."
    )
    return f"## What the paper says of it, and whether it holds\n\n{table}\n\n{note}"


def figure_page(content, name):
    """The notebook of a figure as its page: the published plots, the verdicts, and the code that draws it."""
    notebook = nbformat.reads(content, as_version=4)
    head, *code = notebook.cells
    judged = [nbformat.v4.new_markdown_cell(_judged(name))] if _judged(name) else []
    for cell in code:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.metadata.tags.append("hide-input")
    drawn = nbformat.v4.new_markdown_cell("## How it is drawn")
    notebook.cells = [head, *_shown(name), *judged, drawn, *code]
    return nbformat.writes(notebook)


def fill(app, name, content):
    """Before a page is parsed: what is published, in a figure's page; pages of docs/ have it, between comments."""
    figure = re.fullmatch(r"figures/(fig\d\d|claims|effects|hero|residuals)\w*", name)
    if figure:
        content[0] = figure_page(content[0], figure[1])
    elif name.startswith("docs/"):
        content[0] = re.sub(r"<!-- (value: [\w ]+|end) -->", "", content[0])


def add_scripts(app, name, template, context, doctree):
    """plotly.js, 5 MB, on the pages that need it."""
    if name.startswith("figures/"):
        app.add_js_file("plotly.min.js", defer="defer")
        app.add_js_file("figures.js", defer="defer")
