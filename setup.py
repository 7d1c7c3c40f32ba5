"""Everything that pip needs to know, read from settings.ini: the one place for names, versions and requirements."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
readme = here / "README.md"
repository = f"https://github.com/{settings['user']}/{settings['repo']}"
notebooks = f"{settings['lib_name']}.notebooks"  # in a wheel; a checkout has them beside the package


def long_description():
    """README.md with absolute links, since its files are not beside it on the page of a package index."""
    if not readme.exists():
        return settings["description"]
    kinds = {"src": "raw", "href": "blob", "![": "raw", "[": "blob"}
    text = re.sub(
        r"""(?P<kind>src|href)="(?![a-z]+:|[#/])(?P<path>[^"]+)""",
        lambda m: f'{m["kind"]}="{repository}/{kinds[m["kind"]]}/{settings["branch"]}/{m["path"]}',
        readme.read_text(encoding="utf-8"),
    )
    return re.sub(
        r"(?P<kind>!?\[)(?P<text>[^\]]*)\]\((?![a-z]+:|[#/])(?P<path>[^)\s]+)",
        lambda m: f"{m['kind']}{m['text']}]({repository}/{kinds[m['kind']]}/{settings['branch']}/{m['path']}",
        text,
    )


setup(
    name=settings["repo"],
    version=settings["version"],
    description=settings["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    url=repository,
    packages=[*find_packages(include=[f"{settings['lib_name']}*"]), f"{notebooks}.figures", f"{notebooks}.nbs"],
    package_dir={f"{notebooks}.figures": "figures", f"{notebooks}.nbs": "nbs"},
    package_data={
        f"{notebooks}.figures": ["*.ipynb"],
        f"{notebooks}.nbs": ["explore.ipynb"],
        settings["lib_name"]: ["py.typed"],
        f"{settings['lib_name']}.study": ["versions.lock", "*.toml"],
        f"{settings['lib_name']}.explorer": ["page.html", "page.css", "page.js"],
    },
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "docs", "jpeg", "slurm")},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
)
