"""Sphinx configuration: ``sphinx-build -W docs docs/_build``."""

from __future__ import annotations

import inspect
import re
from typing import Any

from flax import linen as nn
from flax import nnx
from sphinx.application import Sphinx

import jax_na

project = "jax_na"
copyright = "2026, The jax_na authors"
author = "The jax_na authors"
version = release = jax_na.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"jax_na {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The signatures stay legible and the docstrings say what the arguments are.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"inherited-members": False, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True


def layer_signature(
    app: Sphinx, kind: str, name: str, obj: Any, *_: Any
) -> tuple[str, str] | None:
    """The constructor's arguments, which Flax hides in part and lists for each rank."""
    if kind != "class" or not issubclass(obj, (nn.Module, nnx.Module)):
        return None
    if getattr(obj, "rank", None) is not None:
        return "(...)", ""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(obj.__init__).parameters.values()
        if parameter.name not in ("self", "parent")
    ]
    signature = str(inspect.Signature(parameters))
    return re.sub(r"<(?:[^<>]|<locals>)*>", "...", signature), ""  # of functions


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", layer_signature)
