"""The server does what its OpenAPI document says, whatever the request: schemathesis makes the
requests.

`CORRA_API_CASES` is the number of requests for each operation (15; for 500 see
benchmarks/RESULTS.md).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, cast

import pytest

pytest.importorskip("starlette", reason="corra[collector] isn't installed")
if importlib.util.find_spec("schemathesis") is None:
    pytest.skip("schemathesis isn't installed", allow_module_level=True)

from hypothesis import HealthCheck, given, settings

from collector import Client, Served, ended
from corra.collector import pages
from corra.collector.limits import Limits

# schemathesis leaves its client's sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)

CASES = int(os.environ.get("CORRA_API_CASES", "15"))
DOCUMENT = pages.openapi(Limits())
METHODS = {"get", "put", "post", "patch", "delete", "head", "options"}
OPERATIONS = [
    (method, path)
    for path, found in cast("dict[str, Any]", DOCUMENT["paths"]).items()
    for method in found
    if method in METHODS
]


@functools.cache
def operations() -> dict[tuple[str, str], Any]:
    """Return what schemathesis makes of the document. Its import takes 2 s, so it waits."""
    import schemathesis

    schema = schemathesis.openapi.from_dict(DOCUMENT)
    found = [each.ok() for each in cast("Any", schema.get_all_operations())]
    return {(each.method.lower(), each.path): each for each in found}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Served, Client]]:
    found = Served(tmp_path_factory.mktemp("openapi"), "--limits", "rate=1000000,runs=1000000")
    member = Client(found, found.token())
    found.start()
    member.append("known", 0, b"hello\nworld\n")
    member.complete("known", streams={"stdout": {"length": 12}})
    yield found, member
    found.stop()


@pytest.mark.sampled
@pytest.mark.timeout(60 + CASES * 4)
@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
def test_no_question_makes_it_fail_and_each_answer_is_as_documented(served, operation):
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    server, member = served
    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]

    @settings(
        max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(case=operations()[operation].as_strategy())
    def ask(case) -> None:
        if (
            case.path_parameters
            and case.path_parameters.get("prog_id")
            and hash(str(case.path_parameters)) % 2
        ):
            case.path_parameters["prog_id"] = "known"
        query = {**(case.query or {})}
        if case.path.endswith("/events"):
            query["live"] = query.get("live", "false") if query.get("live") != "true" else "false"
            case.query = query
        # A client names a gap's length, and the server sends its NULs: petabytes would take a while
        # to read.
        offset = str((case.headers or {}).get("Upload-Offset", ""))
        if "Upload-Gap" in (case.headers or {}) and offset.isascii() and offset.isdigit():
            case.headers["Upload-Offset"] = str(int(offset) % (1 << 20))
        headers = {"Authorization": f"Bearer {member.token}"}
        case.call_and_validate(base_url=server.url, headers=headers, checks=checks, timeout=30)

    ask()


def test_each_operation_is_asked():
    assert set(operations()) == set(OPERATIONS)


def test_a_run_that_has_ended_is_still_as_it_was(served):
    _, member = served
    assert member.output("known").body == b"hello\nworld\n"
    assert member.run("known")["return_code"] == ended("known")["return_code"]
