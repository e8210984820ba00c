"""Sending the notices of ends, each at least once.

A notice is in the database from the commit of the end until the webhook has taken it.
"""

from __future__ import annotations

import http.client
import logging
import random
import ssl
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from .store import Store

TIMEOUT_S = 15.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 3600.0
GIVE_UP_S = 86400.0

_log = logging.getLogger("corra.collector")


def send_due(store: Store) -> None:
    """Send the notices that are due; put off those that weren't taken."""
    for notice in store.due(time.time()):
        error = _post(notice["hook"], notice["body"])
        where = urlsplit(notice["hook"]).hostname  # with Slack, the rest of the URL is a secret
        if error is None:
            store.settle(notice["id"], None)
            _log.info("webhook", extra={"facts": {"run": notice["run"], "host": where}})
            continue
        over = time.time() - notice["made"] > GIVE_UP_S
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(notice["tries"], 12))
        pause = longest * (0.75 + random.random() / 2)  # noqa: S311
        store.settle(notice["id"], None if over else time.time() + pause)
        _log.warning(
            "webhook failed",
            extra={"facts": {"run": notice["run"], "host": where, "why": error, "given_up": over}},
        )


def _post(url: str, text: str) -> str | None:
    """Post JSON and return the error, if any. A redirect is an error."""
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.netloc, timeout=TIMEOUT_S, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.request(
            "POST", path, text.encode(), {"Content-Type": "application/json", "User-Agent": "corra"}
        )
        status = connection.getresponse().status
        return None if 200 <= status < 300 else f"answered {status}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
