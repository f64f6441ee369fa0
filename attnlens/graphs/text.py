"""Token texts inside XML, CSV and DOT: characters that a file cannot hold, escaped reversibly.

The escape is the one of Office Open XML (ECMA-376, ST_Xstring): `_x0007_` stands for character 7,
and an underscore that happens to begin such a code is itself written `_x005F_`. All other text,
with emoji, quotes and backslashes, stays as it is.
"""

from __future__ import annotations

import re

# What XML 1.0 forbids, lone surrogates, and the carriage return, which parsers turn into a newline.
_FORBIDDEN = "\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff"
_ILLEGAL = re.compile(f"[{_FORBIDDEN}]")
_CODE = re.compile("_x([0-9A-Fa-f]{4})_")
# An underscore that begins a code, or would once the character after it is written as one.
_CODE_START = re.compile(f"_(?=x[0-9A-Fa-f]{{4}}[_{_FORBIDDEN}])")


def escape(text: str) -> str:
    """Text that every file format here can hold; `unescape` gives back the original."""
    return _ILLEGAL.sub(lambda found: f"_x{ord(found[0]):04X}_", _CODE_START.sub("_x005F_", text))


def unescape(text: str) -> str:
    """What `escape` was given."""
    return _CODE.sub(lambda found: chr(int(found[1], 16)), text)
