"""The verb deliver."""

import sys

from ..contract import Refusal
from ..files import replace
from ..paths import beside, octets
from ..records import from_json, to_json
from .archived import ArchivedRun
from .courier_file import place_courier
from .finding import find
from .starter import answer_of


def verb_deliver(request, stdin, reply, framed):
    """Deliver the run's output and end once more, or give its courier another token or route."""
    run = find(request)
    callback = request.get("callback") or {}
    if not run.request.get("callback") and not callback.get("url"):
        raise Refusal("no_callback", "it was started without a callback", state=run.state())
    if isinstance(run, ArchivedRun):
        state = run.state()
        when = "its output was removed on %s" % state["archived_time"][:10]
        raise Refusal("removed", when, state=state)
    place_courier(request.get("courier"))
    if callback.get("token") and not callback.get("url"):
        replace(run.directory, "token", octets(callback["token"]))
    if request.get("route") is not None:
        replace(run.directory, "route", octets(request["route"]))
    found = None
    if request.get("seconds") != 0:
        asked = to_json(
            {"callback": callback, "from": request.get("from"), "seconds": request.get("seconds")}
        )
        words = [sys.executable, "-ISE", beside("courier.py"), "now", run.path, beside("agent.py")]
        found = from_json(answer_of(words, asked, None) or b"null")
    reply.send({"state": run.state(), "delivered": found})
