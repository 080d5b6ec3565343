"""The bonds that a SMILES string states, for the small part of the language that QM9 uses.

QM9's strings are in Kekulé form, without aromatic atoms, isotopes or dots; hydrogen is implicit.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_ORDERS = {"=": 2, "#": 3}
_TOKEN = re.compile(r"\[([A-Z])[^\[\]]*\]|([CNOF])|([=#])|(\d)|([()])")


class Bond(NamedTuple):
    """Two heavy atoms, by their place in the string, and the order of their bond, 1 to 3."""

    first: int
    second: int
    order: int


def parse_smiles(text: str) -> tuple[list[str], list[Bond]]:
    """Read heavy atoms and the bonds between them.

    Args:
        text: Such as ``CC1=C[NH+](C)C1``.

    Returns:
        Element of each heavy atom, in order, and the bonds.

    Raises:
        ValueError: On anything else than atoms C, N, O, F or in brackets, double and triple bonds,
            rings of one digit and branches; or where a ring or branch is left open.
    """
    elements: list[str] = []
    bonds: list[Bond] = []
    branches: list[int] = []
    rings: dict[str, tuple[int, int]] = {}
    last, order, read = -1, 1, 0
    for token in _TOKEN.finditer(text):
        if token.start() != read or (token.group() == ")" and not branches):
            break
        read = token.end()
        bracketed, plain, sign, digit, _ = token.groups()
        if sign:
            order = _ORDERS[sign]
            continue
        if bracketed or plain:
            elements.append(bracketed or plain)
            if last >= 0:
                bonds.append(Bond(last, len(elements) - 1, order))
            last = len(elements) - 1
        elif digit in rings:
            other, there = rings.pop(digit)
            bonds.append(Bond(other, last, max(order, there)))
        elif digit:
            rings[digit] = (last, order)
        elif token.group() == "(":
            branches.append(last)
        else:
            last = branches.pop()
        order = 1
    if read != len(text) or rings or branches or not elements:
        raise ValueError(f"cannot read the SMILES {text!r} from character {read} on")
    return elements, bonds
