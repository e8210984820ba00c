"""Modules that other packages import and no verb needs, left out of each verb's start.

Invoke imports Mock for its MockContext, which is for tests, and with it unittest and asyncio. It
imports its YAML, 17 modules and a pattern that takes 5 ms to compile, also where no configuration
is there to read. paramiko asks importlib.metadata for its own version, and so imports email, csv
and zipfile. Together they are a third of what is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def spared_module(name: str, **instead: Any) -> Iterator[None]:
    """Have the module `name` be a small one with only the names of `instead`, unless it is loaded.

    Another thread that asks it for any other name gets that of the real module.
    """
    if name in sys.modules:
        yield
        return
    small = _Small(name)
    vars(small).update(instead)
    sys.modules[name] = small
    try:
        yield
    finally:
        if sys.modules.get(name) is small:
            del sys.modules[name]


class _Small(types.ModuleType):
    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system's own questions
            raise AttributeError(attribute)
        return getattr(_real(self.__name__), attribute)


def _real(name: str) -> Any:
    if isinstance(sys.modules.get(name), _Small):
        del sys.modules[name]
    return importlib.import_module(name)


@contextlib.contextmanager
def lean_invoke() -> Iterator[None]:
    """Spare Invoke's Mock while it is imported, and its YAML until it reads a configuration."""
    with (
        spared_module("unittest.mock", Mock=type("Mock", (), {})),
        spared_module("invoke.vendor.yaml"),
    ):
        yield


def load_fabric() -> None:
    """Import fabric, and paramiko with it."""
    with spared_module("importlib.metadata", version=_version):
        import fabric  # noqa: F401


def _version(package: str) -> str:
    """Return an installed package's version, which the name of its .dist-info folder has."""
    for folder in sys.path:
        with contextlib.suppress(OSError):
            for each in os.listdir(folder or "."):
                name, _, version = each.removesuffix(".dist-info").partition("-")
                if version and name.lower() == package and each.endswith(".dist-info"):
                    return version
    return str(_real("importlib.metadata").version(package))
