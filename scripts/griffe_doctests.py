"""For the site's reference: the examples in docstrings as blocks of code.

Markdown takes ``>>>`` for quotations. `mkdocs.yml` names this file as an extension of
griffe, which reads the docstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", flags=re.M)


class Doctests(griffe.Extension):
    """Fences every example, up to its blank line."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """A docstring whose examples are blocks of code.

    >>> print(fenced("One.\\n\\n>>> 1 + 1\\n2\\n\\nMore."))
    One.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    <BLANKLINE>
    More.
    """
    return _EXAMPLE.sub(lambda example: f"```pycon\n{example[0]}\n```", docstring)
