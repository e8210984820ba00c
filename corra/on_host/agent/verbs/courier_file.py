"""The courier's file beside the agent."""

import posix as os

from ..contract import Refusal
from ..files import replace
from ..paths import beside, octets, parent, present, slurp


def place_courier(source):
    """Put the courier that came with the request beside the agent. Raises Refusal.

    By hand none comes, and it must be there.
    """
    path = beside("courier.py")
    there = slurp(path, 1 << 20) if present(path) else None
    if source is None and there is None:
        raise Refusal(
            "no_courier", "a callback needs courier.py beside agent.py: %s isn't there" % path
        )
    if source is None or there == octets(source):
        return
    try:
        above = os.open(parent(path), os.O_RDONLY | os.O_DIRECTORY)
        replace(above, "courier.py", octets(source))
        os.close(above)
    except OSError as error:
        tried = [{"dir": parent(path), "errno": error.errno, "message": error.strerror}]
        raise Refusal(
            "no_room", "no room for the courier: " + error.strerror, tried=tried
        ) from None
