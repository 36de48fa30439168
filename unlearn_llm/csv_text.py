"""CSV that no spreadsheet runs."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def no_formula(text: str) -> str:
    """Quote a text that begins like a formula; names come from recipes of anybody."""
    return f"'{text}" if text.startswith(FORMULA) else text
