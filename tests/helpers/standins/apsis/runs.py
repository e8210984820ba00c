import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"\{\{\s*(\w+)\s*\}\}")


def template_expand(template: str, args: Mapping[str, Any]) -> str:
    """Return `template` with its arguments. Raises NameError for one that isn't given.

    Apsis has all of Jinja2 here.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in args:
            raise NameError(f"name '{name}' is not defined")
        return str(args[name])

    return _NAME.sub(value, str(template))
