"""Names that anybody chose, made harmless for a terminal and a spreadsheet."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def printable(text: str) -> str:
    """Escape control characters: a name must not move the cursor or break a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def no_formula(text: str) -> str:
    """Quote a text that a spreadsheet would run."""
    return f"'{text}" if text.startswith(FORMULA) else text


def folder_name(path: str) -> str:
    """Make one folder's name of a path or a hub id; a name of dots would lead out of a folder."""
    name = path.replace("/", "--")
    return name if name.strip(".") else "-".join(["", *name])
