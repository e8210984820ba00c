"""Ids: which texts are ids, what people type of them, and new ones."""

import posix as os
import time

ID_ALPHABET = "23456789bcdfghjkmnpqrstvwxz"


def valid_id(text):
    first, rest = "abcdefghijklmnopqrstuvwxyz0123456789", "._-"
    return (
        0 < len(text) <= 64
        and text[0] in first
        and all(char in first or char in rest for char in text)
    )


def tail_of(prog_id):
    """Return what people type of an id: its last 8 characters, or all of an id of their own."""
    stamp, dash, tail = prog_id.rpartition("-")
    made = (
        dash
        and len(stamp) == 16
        and stamp[8] == "t"
        and stamp[15] == "z"
        and (stamp[:8] + stamp[9:15]).isdigit()
    )
    return (
        tail if made and len(tail) == 8 and all(char in ID_ALPHABET for char in tail) else prog_id
    )


def new_id():
    letters = "".join(ID_ALPHABET[byte % len(ID_ALPHABET)] for byte in os.urandom(8))
    return time.strftime("%Y%m%dt%H%M%Sz-", time.gmtime()) + letters
