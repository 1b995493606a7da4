"""Python functions that become tools."""

from enum import Enum
from typing import Any, Literal


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


def weather(city: str, days: int = 1, unit: Unit = Unit.CELSIUS) -> float:
    """Return the weather <now> & "then".

    A second paragraph
    with two lines.

    Args:
        city: Name of the city,
            with its country
        days (int): Number of days (choices: [1, 7])
        unit: Unit: of the result

    Returns:
        The temperature

    Raises:
        ValueError: If there is no such city
    """
    raise NotImplementedError(city, days, unit)


def clock():
    """Return the time."""


def everything(
    a: int | None,
    b: int | str,
    c: list[dict[str, float]] | None,
    d: tuple[int, str],
    e: Literal["x", 1, None],
    f: Any,
    g: dict,
    h: list[int] | str = "",
    i: bool = True,
) -> Exception:
    """Return nothing.
    It has many parameters.

    Args:
        a: First
        b: Second
        c: Third

        d: Fourth
        e: Fifth
        f: Sixth
        g: Seventh
        h: Eighth
        i: Ninth
    """
    raise NotImplementedError(a, b, c, d, e, f, g, h, i)


class Store:
    """An object with a method for a model."""

    def find(self, name: str) -> list[str]:
        """
        Return the items of a name.

        Args:
            name: The name

        Returns:
            list: The items
        """
        raise NotImplementedError(name)


#: Functions with docstrings that ``transformers`` can read, by name.
FUNCTIONS = {"weather": weather, "clock": clock, "everything": everything, "find": Store().find}
