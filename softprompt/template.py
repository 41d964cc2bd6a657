"""What a template may hold: text, and columns by their plain names.

Format specifications and conversions are refused: they say nothing to a model, and `{text:>999999999}` fills memory.
"""

from string import Formatter


def columns_of(template: str) -> list[str]:
    """The columns that a template names, in order; ValueError where a placeholder is anything but a column's name."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"template: {error}; write {{{{ and }}}} for braces") from None
    for _, name, specification, conversion in parts:
        if specification or conversion or not str(name).isidentifier():
            found = f"{name}{'!' if conversion else ''}{conversion or ''}{':' if specification else ''}{specification}"
            raise ValueError(f"template: a placeholder must be a plain column name, got {{{found[:60]}}}")
    return list(dict.fromkeys(str(name) for _, name, _, _ in parts))
