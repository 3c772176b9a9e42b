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
import jax
import optax
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.domains.python import PyObject
from sphinx.util import logging
from sphinx.util.typing import stringify_annotation

import decentral_jax

DOCS = Path(__file__).resolve().parent

project = "decentral_jax"
author = "the decentral_jax authors"
release = version = decentral_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Links to the references of other projects. Their inventories come from the network,
# and a missing inventory is a warning, so a build fetches them on request only.
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "flax": ("https://flax.readthedocs.io/en/stable", None),
    "jax": ("https://docs.jax.dev/en/latest", None),
    "optax": ("https://optax.readthedocs.io/en/stable", None),
}
# Where there are prompts, the copy button copies the lines behind them only.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
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
html_math_renderer = "mathml"

# Signatures show types; docstrings describe what they mean.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
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


# What docutils does not know, as it writes it.
MACROS = {"dots": r"\ldots", "iff": r"\Longleftrightarrow", "textstyle": ""}


def mathml(node, as_block):
    """Returns a formula as MathML, which browsers render without scripts."""
    formula = re.sub(
        rf"\\({'|'.join(MACROS)})(?![A-Za-z])",
        lambda match: MACROS[match[1]],
        node.astext(),
    )
    # Keep an index of an accented letter out of the accent.
    accent = r"(\\(?:bar|hat|tilde) ?(?:\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]))(?=[_^])"
    formula = re.sub(accent, r"\1{}", formula)
    # As Sphinx does, align formulas in docstrings that have several lines.
    if r"\\" in formula and r"\begin" not in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    try:
        return tex2mathml(formula, as_block=as_block)
    except MathError as error:
        message = "%s: write the formula in other words of TeX"
        logging.getLogger(__name__).warning(message, error, location=node)
        return ""


def visit_math(self, node):
    """Writes an inline formula."""
    self.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(self, node):
    """Writes a displayed formula."""
    formula = mathml(node, as_block=True)
    self.body.append(self.starttag(node, "div", formula, CLASS="math") + "</div>")
    raise nodes.SkipNode


def link_names(app, doctree):
    """Turns names such as `dj.mix` and `optax.adam` into links to their references."""
    for node in list(doctree.findall(nodes.literal)):
        match = re.fullmatch(r"(dj|flax|jax|optax)\.([\w.]+)(\(\))?", node.astext())
        skip = isinstance(node.parent, (nodes.title, nodes.reference))
        if match is None or skip:
            continue
        own = match[1] == "dj"
        link = addnodes.pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=f"{'decentral_jax' if own else match[1]}.{match[2]}",
            refdoc=app.env.docname,
            refwarn=own,  # the others have a target only with intersphinx
        )
        node.replace_self(link)
        link += node


def check_reference(app, env):
    """Warns about public names that are missing in the API reference."""
    modules = (decentral_jax, decentral_jax.topology)
    public = {f"{m.__name__}.{name}" for m in modules for name in m.__all__}
    for name in sorted(public - set(env.domains["py"].objects)):
        logging.getLogger(__name__).warning("%s is missing in docs/api", name)


# Types that signatures show by name, the longest first.
TYPES = {
    "Optimizer | ScalarOrSchedule": (
        optax.GradientTransformation | optax.ScalarOrSchedule
    ),
    "ScalarOrSchedule": optax.ScalarOrSchedule,
    "Params": optax.Params,
    "ArrayLike": jax.typing.ArrayLike,
}


def name_types(app, kind, name, obj, options, arguments, returned):
    """Shows unions of many types by the names that optax and JAX give them."""
    del app, kind, name, obj, options
    for short, union in TYPES.items():
        long = stringify_annotation(union, "smart")
        arguments = arguments and arguments.replace(long, short)
        returned = returned and returned.replace(long, short)
    return arguments, returned


def setup(app):
    """Generates the tables, and connects the functions above."""
    generate.write_tables(DOCS / "_generated")
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-docstring", hide_colon, priority=400)
    app.connect("autodoc-process-docstring", show_colon, priority=600)
    app.connect("autodoc-process-signature", name_types)
    app.connect("doctree-read", link_names)
    app.connect("env-check-consistency", check_reference)
