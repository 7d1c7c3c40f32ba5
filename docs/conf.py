"""The book: every chapter as it is in git, stored outputs included. Nothing is run, and torch is not needed."""

import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from astroid.exceptions import AstroidImportError
from astroid.manager import AstroidManager

HERE = Path(__file__).parent
ROOT = HERE.parent
SOURCE = HERE / "_build/source"  # laid out by .ci/book.py
sys.path[:0] = [str(HERE), str(ROOT)]

from chapters import MODULES, REFERENCE  # noqa: E402

settings = ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
about = settings["DEFAULT"]
repository = os.environ.get("GITHUB_REPOSITORY") or f"{about['user']}/{about['repo']}"
branch = about["branch"]

project, author, copyright, release = about["repo"], about["author"], about["copyright"], about["version"]
language = "en"
extensions = ["myst_nb", "sphinx_external_toc", "autodoc2", "sphinx_copybutton"]
external_toc_path = str(HERE / "_toc.yml")
exclude_patterns = ["nbs/explore.ipynb"]

nb_execution_mode = "off"
nb_custom_formats = {".ipynb": ["chapters.read", {}]}
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables in outputs
myst_enable_extensions = ["amsmath", "deflist", "dollarmath", "html_image"]
myst_heading_anchors = 4
myst_heading_slug_func = "chapters.slug"
# Constants assigned in pairs, which autodoc2 does not see, and `bytes`, which fields of classes are called too.
suppress_warnings = ["autodoc2.dup_item", "autodoc2.all_resolve", "ref.python", "etoc.toctree"]

# Read, not imported. Docstrings are Markdown.
autodoc2_packages = [
    {
        "path": os.path.relpath(ROOT / "sparse_nb", SOURCE),
        "module": "sparse_nb",
        "exclude_files": ["_modidx.py", "__main__.py"],
    }
]
autodoc2_render_plugin = "myst"
autodoc2_docstring_parser_regexes = [(".*", "myst")]
# What `#| export` lists is the reference; what `#| exporti` hands to other chapters is described there.
autodoc2_module_all_regexes = [f"{re.escape(module)}$" for module in sorted(REFERENCE)]
autodoc2_skip_module_regexes = [f"{re.escape(module)}$" for module in sorted(MODULES.keys() - REFERENCE)]
autodoc2_hidden_objects = ["private", "dunder", "inherited"]
autodoc2_output_dir = "reference"
autodoc2_index_template = None

html_theme = "sphinx_book_theme"
html_title = "sparse-nb: a paper you can run"
html_static_path = [str(HERE / "static"), str(SOURCE / "static")]
html_extra_path = [str(SOURCE / "extra")]
html_favicon = str(HERE / "static/favicon.svg")
html_css_files = ["book.css"]
html_context = {"default_mode": "auto"}
html_copy_source = True
mathjax_path = "mathjax.js"  # one file, of this site
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would fetch more
copybutton_exclude = ".linenos, .gp, .go"
html_theme_options = {
    "repository_provider": "github",
    "repository_url": f"https://github.com/{repository}",
    "repository_branch": branch,
    "path_to_docs": "",
    "navbar_persistent": [],
    "use_repository_button": True,
    "use_download_button": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "collapse_navbar": True,  # listing every page on every page takes a third of the build
    "launch_buttons": {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"},
}


def _of_another_package(self, name, *args, **kwargs):
    raise AstroidImportError("not read", modname=name)


# Names and docstrings are enough here. To infer types, astroid would read PyTorch and pandas.
AstroidManager.ast_from_module_name = _of_another_package


def _allow_parallel(extension):
    if extension:
        extension.parallel_read_safe = extension.parallel_write_safe = True


def _drop_stale(app, error):
    """Remove the pages of chapters and modules that are gone, which an earlier build has left."""
    for page in Path(app.outdir).rglob("*.html"):
        name = page.relative_to(app.outdir).with_suffix("").as_posix()
        if "/" in name and not name.startswith("_") and name not in app.env.found_docs:
            page.unlink()


def setup(app):
    import chapters
    import published

    # It numbers nothing here, and does not say that it could run in parallel.
    app.connect("config-inited", lambda app, _: _allow_parallel(app.extensions.get("sphinx_multitoc_numbering")))
    app.connect("source-read", published.fill)
    app.connect("source-read", chapters.link_page)
    app.connect("html-page-context", published.add_scripts)
    app.connect("build-finished", _drop_stale)
