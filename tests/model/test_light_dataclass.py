"""A light dataclass does what a frozen dataclass does."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, replace
from typing import Any

import pytest

from corra import Host, State
from corra.model.light_dataclass import light_dataclass


@light_dataclass(frozen=True)
class Made:
    """A light dataclass."""

    name: str
    size: int = 3
    tags: tuple[str, ...] = ()
    more: dict[str, int] = field(default_factory=dict)
    secret: str = field(default="", repr=False)

    @property
    def loud(self) -> str:
        return self.name.upper()


@dataclass(frozen=True)
class Plain:
    """A dataclass of the same fields."""

    name: str
    size: int = 3
    tags: tuple[str, ...] = ()
    more: dict[str, int] = field(default_factory=dict)
    secret: str = field(default="", repr=False)


WAYS: list[Callable[[Any], Any]] = [
    lambda made: made("a"),
    lambda made: made("a", 4, ("x",), {"y": 1}, "z"),
    lambda made: made(size=4, name="a", secret="hidden"),
    lambda made: replace(made("a"), size=9),
    lambda made: copy.deepcopy(made("a", more={"b": 1})),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_light_dataclass_shows_its_fields_as_a_dataclass_does(way: Callable[[Any], Any]) -> None:
    made, plain = way(Made), way(Plain)
    assert asdict(made) == asdict(plain)
    assert repr(made).replace("Made(", "Plain(") == repr(plain)
    assert "hidden" not in repr(made)
    assert [each.name for each in fields(made)] == [each.name for each in fields(plain)]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda made: made(),
        lambda made: made("a", 1, (), {}, "", 6),
        lambda made: made("a", name="b"),
        lambda made: made("a", colour="red"),
        lambda made: replace(made("a"), colour="red"),
    ],
)
def test_a_light_dataclass_takes_no_other_arguments_than_a_dataclass(
    wrong: Callable[[Any], Any],
) -> None:
    for kind in (Plain, Made):
        with pytest.raises(TypeError):
            wrong(kind)


def test_light_dataclasses_are_equal_by_their_fields_and_their_class() -> None:
    assert Made("a", 1) == Made("a", 1) != Made("a", 2)
    others: list[Any] = [Plain("a"), ("a", 3, (), {}, ""), None]
    assert all(Made("a") != other for other in others)
    assert len({Host("h"), Host("h"), Host("i")}) == 2
    assert hash(Host("h", 22)) == hash(Host("h", 22))


def test_a_light_dataclass_is_frozen_and_travels() -> None:
    made = Made("a")
    with pytest.raises(FrozenInstanceError):
        made.size = 4  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        del made.size
    assert pickle.loads(pickle.dumps(made)) == copy.copy(made) == made
    assert made.loud == "A"


def test_each_light_dataclass_has_a_default_of_its_own() -> None:
    assert Made("a").more is not Made("a").more


def test_the_signature_of_a_light_dataclass_names_its_fields() -> None:
    assert list(inspect.signature(Made).parameters) == list(inspect.signature(Plain).parameters)
    shown = inspect.signature(State).parameters
    assert shown["grace"].default == 10.0 and shown["prog_id"].default is inspect.Parameter.empty
