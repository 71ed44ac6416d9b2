"""The documentation site: `python -m sphinx -W --keep-going docs docs/_build`."""

from __future__ import annotations

import lightning_gradguard

project = "lightning_gradguard"
release = lightning_gradguard.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lightning_gradguard"

myst_heading_anchors = 3
# Pages of the repository show source files by paths that are right there.
suppress_warnings = ["misc.highlighting_failure"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
nitpicky = False  # types of torch and Lightning have no pages here
