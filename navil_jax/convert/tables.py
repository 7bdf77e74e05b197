"""Aligned text tables for reports."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells; a column of numbers is aligned at the right, by its first row.

    Example:
      table(("group", "tensors"), [("head", "1"), ("vision", "36")]) ->
        group   tensors
        head          1
        vision       36
    """
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [bool(rows) and cell[:1].isdecimal() for cell in (rows[0] if rows else head)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )
