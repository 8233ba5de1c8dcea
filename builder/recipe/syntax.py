"""What tomllib finds wrong → one line with the line of the file, and the likely cause."""

import re
import tomllib

MAX_SHOWN = 80
"""Characters of a line."""
CAUSES = (
    ("Invalid value", r"=\s*\0\s*(#|$)", "give the key a value, or leave it out"),
    ("Invalid value", r"\0\s*(#|$)", "close the list with ]"),
    ("Invalid value", r"\0(?i:true|false)\b", "write true and false in lowercase"),
    ("Invalid value", r"\0(?i:none|null|nil)\b", "TOML has no null: leave the key out"),
    ("Invalid value", "\0[“”„‘’]", "put text in straight quotes"),
    ("Invalid value", r"\0[-+.\d]", "write a number as 0.5 or 1_000"),
    ("Invalid value", r"", 'put text in quotes, such as "x"'),
    ("Expected '='", r"\0\s*:", "write = instead of the colon"),
    ("Expected '='", r"", "write a key and its value as key = value"),
    ("Expected newline", r"\d\0,\d", "write a number without commas, such as 1_000_000"),
    ("Expected newline", r"\d\0", "write a number as 0.5 or 1_000, and text in quotes"),
    ("Expected newline", r"", "write one key = value per line, and text in one pair of quotes"),
    ("Invalid hex|Unescaped", r"", "write the path with / instead of backslashes"),
    ("Unterminated|Illegal character '.n'", r"", "close the text with a quote on the same line"),
    ("Unclosed array", r"", "put commas between the values of the list, and ] after them"),
    ("Unclosed inline", r"", "close the table with } on the same line"),
    ("Cannot|Duplicate", r"", "this key or section appears twice; remove one"),
    ("Expected ']", r"", "write a section as [name]"),
    ("Invalid (statement|initial)", r"", "write key = value, or [section]"),
)  # fmt: skip
"""What tomllib says, what stands there (\\0 is the place), and what to do about it; the first that fits."""


def what_is_wrong(text: str, error: tomllib.TOMLDecodeError) -> str:
    """Of a recipe that is not TOML: the line, and the likely cause."""
    reason, _, place = str(error).removesuffix(")").rpartition(" (at ")
    lines = text.rstrip().split("\n")
    number, column = len(lines), len(lines[-1]) + 1  # "end of document"
    if found := re.fullmatch(r"line (\d+), column (\d+)", place):
        number, column = min(int(found[1]), number), int(found[2])
    line = lines[number - 1].rstrip()
    marked = f"{line[: column - 1]}\0{line[column - 1 :]}"
    fitting = (a for said, stands, a in CAUSES if re.match(said, reason) and re.search(stands, marked))  # fmt: skip
    shown = line.strip() if len(line) <= MAX_SHOWN else f"{line.strip()[: MAX_SHOWN - 1]}…"
    return f"line {number}, column {column} is not valid TOML: `{shown}`; {next(fitting, reason)}"
