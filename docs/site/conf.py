"""Sphinx's settings for the site, which `scripts/site` builds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from docutils.nodes import TextElement

import corra
from corra.on_host.agent.contract import VERSION

if TYPE_CHECKING:
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "corra"
copyright = "the authors of corra"  # noqa: A001 - Sphinx's name
release = version = VERSION
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"corra {VERSION}"
# The words of corra's screens stand in blocks that are no language of Pygments'.
highlight_language = "none"
html_copy_source = False
html_show_sphinx = False
html_last_updated_fmt = None
# The same commit makes the same bytes.
os.environ.setdefault("SOURCE_DATE_EPOCH", "0")

# benchmarks/run.py writes its figures under small headings.
suppress_warnings = ["myst.header"]
smartquotes = False
# `## Stop a program` is `#stop-a-program`, as on a forge.
myst_heading_anchors = 4
# In a docstring, `name` is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
# A hint may name a type that isn't corra's promise; the page then shows its name without a link.
nitpick_ignore_regex = [("py:.*", r"(?!corra\.[A-Za-z]+$).*")]


def promised(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: TextElement
) -> TextElement | None:
    """Link `corra.runs.run.Run`, as a hint names it, to `corra.Run`, as the page does."""
    target = node.get("reftarget", "")
    name = target.rpartition(".")[2]
    if not target.startswith("corra.") or name not in corra.__all__ or target == f"corra.{name}":
        return None
    domain = env.domains.python_domain
    found: TextElement | None = domain.resolve_any_xref(  # type: ignore[assignment]
        env, node["refdoc"], app.builder, f"corra.{name}", node, contnode
    )[0][1]
    return found


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect `promised`."""
    app.connect("missing-reference", promised)
    return {"parallel_read_safe": True}
