"""Builds the site: make docs. Its source is the repository, so that links between pages are the same as on GitHub."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import site_pages

project = "torchops"

version = release = (site_pages.PACKAGE / "version.txt").read_text().strip()

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "docs/api/**.rst", "examples/README.md"]
exclude_patterns = [".*", "build", "dist", "csrc", "cmake", "tests", "tools", "torchops"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # GitHub's mark of a formula
myst_heading_anchors = 3

autodoc_inherit_docstrings = False  # torch.nn.Module says the same of every forward
autodoc_default_options = {"members": True, "no-value": True}
autodoc_preserve_defaults = True
napoleon_use_rtype = False  # what is returned has several parts, each with a shape
python_maximum_signature_line_length = 100
nitpicky = True
nitpick_ignore = [("py:class", "torchops.nn.stf_sizes.Sizes")]  # internal, in the signature of a public method
nitpick_ignore_regex = [(r"py:class", r"(?!torchops\b).*")]  # other libraries' types

html_theme = "furo"
html_title = f"torchops {version}"
html_copy_source = False
html_show_copyright = False
html_extra_path = ["_redirect"]


def setup(app: Any) -> None:
    public = site_pages.write_api()
    site_pages.stand_in_for_integrations()
    app.connect("doctree-read", site_pages.adapt_links(public))
