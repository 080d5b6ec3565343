"""Renders the TeX between dollar signs as MathML while the pages are built.

Browsers show MathML by themselves, so the pages carry neither a script nor fonts for it.
"""

import html
import logging
import re

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.mathml")

# What pymdownx.arithmatex leaves of $…$ and $$…$$ with `generic: true`.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
_TILDE = ('<mo stretchy="false">&#x0007E;</mo>', '<mo stretchy="false">&#x002DC;</mo>')
# The converter copies a command that it does not know, or an alignment outside `align*`.
_NOT_CONVERTED = re.compile(r"<m\w+>(\\[A-Za-z]+|&(?:amp;)?)</m\w+>")


def on_page_content(content, *, page, **_):
    """Replace every formula of a page; a strict build fails on one that cannot be converted."""

    def render(match):
        tex = html.unescape(match["tex"]).strip()
        display = "block" if match["tag"] == "div" else "inline"
        try:
            mathml = convert(tex, display=display)
        except Exception as error:
            log.warning("%s: cannot convert the formula %r: %r", page.file.src_uri, tex, error)
            return match[0]
        # The converter makes a letter of this relation, which browsers set without space around it.
        mathml = mathml.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
        # A transposition is no operator between two operands.
        mathml = mathml.replace("<mo>&#x022A4;</mo>", "<mi>&#x022A4;</mi>")
        # An accent sits close to its letter, and of the two tildes one is made for it.
        mathml = mathml.replace("<mover>", '<mover accent="true">').replace(*_TILDE)
        if unknown := _NOT_CONVERTED.search(mathml):
            log.warning("%s: %s is not supported in %r", page.file.src_uri, unknown[1], tex)
        return mathml if display == "inline" else f'<div class="formula">{mathml}</div>'

    return _FORMULA.sub(render, content)
