"""How `--help` shows examples: below everything else, one on a line, ready to be copied. A test parses each of them."""


def examples(*commands: str) -> str:
    """Return the epilog of a command; empty lines keep the lines apart, which are otherwise joined."""
    return "\n\n".join(["Examples:", *(f"  {command}" for command in commands)])
