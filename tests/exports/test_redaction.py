"""What is a secret is cut out, however its bytes came; all else stays, in its order and time."""

from __future__ import annotations

import random

import pytest

from corra.errors import Misuse
from corra.exports.redaction import KEY_MAX, LINE_MAX, RedactedOutput, Redactor, read_rules
from corra.model.frames import Gap, Output

PEM = b"-----BEGIN RSA PRIVATE KEY-----\n" + b"MIIEow\n" * 20 + b"-----END RSA PRIVATE KEY-----\n"
SECRETS = {
    "named secret": b"export DB_PASSWORD=hunter2hunter2 x",
    "AWS key": b"id AKIAIOSFODNN7EXAMPLE is",
    "GitHub token": b"ghp_" + b"a1" * 18,
    "password in a URL": b"git clone https://me:hunter2hunter2@example.org/x",
    "authorization": b"Authorization: Bearer hunter2hunter2hunter2",
    "JSON web token": b"eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeKKF2QT4",
    "secret flag": b"mysql --db-password hunter2hunter2 -e 1",
    "private key": PEM,
}


def redacted(data: bytes, cuts: list[int], redactor: Redactor | None = None) -> bytes:
    ends = [*cuts, len(data)]
    begins = [0, *cuts]
    outputs = [
        Output("stdout", begin, data[begin:end], begin + 1)
        for begin, end in zip(begins, ends, strict=True)
        if end > begin
    ]
    found = list(RedactedOutput(redactor or Redactor()).of(outputs))
    times = [each.time_ns for each in found if isinstance(each, Output)]
    assert times == sorted(times)
    return b"".join(each.data for each in found if isinstance(each, Output))


@pytest.mark.parametrize("name", SECRETS)
def test_each_kind_of_secret_is_found_in_whatever_pieces_it_comes(name):
    data = b"before\n" + SECRETS[name] + b"\nafter\n"
    chance = random.Random(name)
    for _ in range(20):
        cuts = sorted(chance.sample(range(1, len(data)), 5))
        redactor = Redactor()
        out = redacted(data, cuts, redactor)
        assert out.startswith(b"before\n") and out.endswith(b"after\n")
        assert b"hunter2" not in out and b"[REDACTED]" in out and b"MIIE" not in out
        assert redactor.hits == {name: 1}


def test_what_has_no_secret_passes_byte_for_byte():
    chance = random.Random(1)
    data = b"".join(bytes([chance.randrange(1, 255)]) for _ in range(50_000))
    data += b"x" * (3 * LINE_MAX) + b"\n-----BEGIN PUBLIC KEY-----\nabc\n"
    cuts = sorted(chance.sample(range(1, len(data)), 50))
    assert redacted(data, cuts, Redactor(())) == data


def test_a_secret_in_a_line_that_never_ends_is_found():
    data = b"." * LINE_MAX + b"password=hunter2hunter2 " + b"." * (2 * LINE_MAX)
    cuts = list(range(1000, len(data), 32768))
    assert b"hunter2" not in redacted(data, cuts)


def test_a_key_that_has_no_end_is_cut_out_as_far_as_a_key_goes():
    data = PEM[:60] + b"MIIEow\n" * (KEY_MAX // 7 + 300) + b"still here\n"
    out = redacted(data, list(range(1000, len(data), 1000)))
    assert out.startswith(b"[REDACTED]") and out.endswith(b"still here\n")


def test_two_streams_and_gaps_keep_their_order():
    events = [
        Output("stdout", 0, b"token: abc", 1),
        Output("stderr", 0, b"err\n", 2),
        Gap("stdout", 10, 20),
        Output("stdout", 20, b"def\n", 3),
    ]
    found = list(RedactedOutput(Redactor()).of(events))
    assert [(each.stream, getattr(each, "data", None)) for each in found] == [
        ("stdout", b"token: [REDACTED]"),
        ("stderr", b"err\n"),
        ("stdout", None),
        ("stdout", b"def\n"),
    ]


def test_rules_of_a_file_are_added_and_a_wrong_one_is_named(tmp_path):
    rules = tmp_path / "rules"
    rules.write_text("# mine\n\nticket ([A-Z]+-\\d+)\n")
    redactor = Redactor(read_rules(str(rules)))
    assert redactor.text("ticket OPS-12 ok") == "ticket [REDACTED] ok"
    assert redactor.argv(["psql", "--token", "x y", "-v"]) == [
        "psql",
        "--token",
        "[REDACTED]",
        "-v",
    ]
    for text, why in (("(", "rules:1: not a regular"), ("x*", "rules:1: it matches everywhere")):
        rules.write_text(text)
        with pytest.raises(Misuse, match=why):
            read_rules(str(rules))
