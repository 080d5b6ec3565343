"""Lets the reference show the Sphinx roles in docstrings, which are Markdown everywhere else."""

import re

import griffe

_ROLE = re.compile(r":(?P<role>[a-z]+):`(?P<text>[^`]+)`")
_FORMULA = re.compile(r"^[ ]*\.\. math:: (?P<tex>.+)$", re.MULTILINE)
_LITERAL_BLOCK = re.compile(r"^(?P<indent>[ ]*)(?P<lead>.*[^:\s])::$", re.MULTILINE)


def _reference(role, text, obj):
    if role == "math":
        return f"${text}$"
    if text.startswith("bayesagg.") and role != "data":  # not every constant is in the reference
        return f"[`{text}`][{text}]"  # a strict build fails where it leads nowhere
    if text.startswith("bayesagg."):
        return f'<autoref optional identifier="{text}"><code>{text}</code></autoref>'
    try:
        path = obj.resolve(text)
    except griffe.NameResolutionError:
        return f"`{text}`"
    # Optional: what is private has no place to lead to.
    return f'<autoref optional identifier="{path}"><code>{text}</code></autoref>'


def _literal_block(match):
    # "Example:" alone would open a section of its own, which takes no literal block.
    lead = match["lead"]
    return f"{match['indent']}{f'**{lead}**' if lead.isalpha() else lead}:"


class Roles(griffe.Extension):
    """Rewrites the docstring of every object."""

    def on_object(self, *, obj, **_):
        """Turn roles into links, formulas and code, directives into formulas, ``::`` into ``:``."""
        if obj.docstring:
            text = _ROLE.sub(
                lambda match: _reference(match["role"], match["text"].removeprefix("~"), obj),
                obj.docstring.value,
            )
            text = _FORMULA.sub(lambda match: f"$${match['tex']}$$", text)
            obj.docstring.value = _LITERAL_BLOCK.sub(_literal_block, text)
