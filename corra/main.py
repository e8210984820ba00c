"""The `corra` command: the same verbs as `inv` finds in tasks.py, wherever one stands."""

from __future__ import annotations

import sys

from invoke.program import Program

from .tasks import ns


class _Corra(Program):
    """Invoke's program over our verbs; what the version is, is looked up only by who asks for it."""

    def print_version(self) -> None:
        from .agent import VERSION

        print(f"{self.name} {VERSION}")


program = _Corra(name="corra", binary="corra", binary_names=["corra"], namespace=ns)


def main() -> None:
    """Run the command line."""
    program.run(sys.argv)
