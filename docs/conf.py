"""The site: ``sphinx-build -W --keep-going -b html docs build/docs``."""

import inspect

from sphinx.util.inspect import stringify_signature

import insvp_fast

project, author, copyright = "insvp_fast", "The insvp_fast authors", "The insvp_fast authors"
version = release = insvp_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"insvp_fast {release}"
exclude_patterns = ["assets"]

myst_heading_anchors = 3  # `page.md#a-heading`, as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them, in the source's own words
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
napoleon_use_ivar = True  # a field of a named tuple is described by the class and by itself


def setup(app):
    """Show the arguments of ``__init__`` where a class has a ``__new__`` that takes anything."""

    def signature_of(app, what, name, obj, options, signature, returns):
        if what == "class" and signature == "(*args, **kwargs)":
            own = inspect.signature(obj.__init__)
            plain = own.replace(parameters=list(own.parameters.values())[1:], return_annotation=own.empty)
            signature = stringify_signature(plain, show_annotation=False)
        return signature, returns

    app.connect("autodoc-process-signature", signature_of)
