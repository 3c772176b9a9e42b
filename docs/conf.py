"""Sphinx configuration of the pages, pictures, and API reference."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "examples"))
# Set before JAX starts: the examples on the pages run on eight fake devices.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["MPLBACKEND"] = "Agg"

import generate
from docutils import nodes
from sphinx import addnodes
from sphinx.domains.python import PyObject
from sphinx.util import logging

import decentral_jax

DOCS = Path(__file__).resolve().parent

project = "decentral_jax"
author = "the decentral_jax authors"
release = version = decentral_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"decentral_jax {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False

# Docstrings describe types in words.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
for field in PyObject.doc_field_types:
    if field.name == "variable":
        field.label = "Attributes"
# Single backticks in docstrings mean code.
default_role = "code"


# Napoleon parses the summary line of a property, such as "Whether rows sum to one: a
# constant stays.", as a type and a description. Hide the colon while napoleon runs.
COLON = "\ue000"


def hide_colon(app, what, name, obj, options, lines):
    """Hides colons in the summary line of a property, before napoleon runs."""
    if what == "property" and lines:
        lines[0] = lines[0].replace(":", COLON)


def show_colon(app, what, name, obj, options, lines):
    """Restores hidden colons, after napoleon runs."""
    lines[:] = [line.replace(COLON, ":") for line in lines]


def link_names(app, doctree):
    """Turns `dj.name` in code font into a link to the name's reference."""
    for node in list(doctree.findall(nodes.literal)):
        match = re.fullmatch(r"dj\.([\w.]+)(\(\))?", node.astext())
        skip = isinstance(node.parent, (nodes.title, nodes.reference))
        if match is None or skip:
            continue
        link = addnodes.pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=f"decentral_jax.{match[1]}",
            refdoc=app.env.docname,
            refwarn=True,
        )
        node.replace_self(link)
        link += node


def check_reference(app, env):
    """Warns about public names that are missing in the API reference."""
    modules = (decentral_jax, decentral_jax.topology)
    public = {f"{m.__name__}.{name}" for m in modules for name in m.__all__}
    for name in sorted(public - set(env.domains["py"].objects)):
        logging.getLogger(__name__).warning("%s is missing in docs/api", name)


def setup(app):
    """Generates pictures and tables, and connects the functions above."""
    generate.write_all(DOCS / "_generated")
    app.connect("autodoc-process-docstring", hide_colon, priority=400)
    app.connect("autodoc-process-docstring", show_colon, priority=600)
    app.connect("doctree-read", link_names)
    app.connect("env-check-consistency", check_reference)
