"""What a long step says on standard error."""

import sys


def say(line: str) -> None:
    """Write one line to standard error, where it cannot mix with results."""
    sys.stderr.write(f"moa: {line}\n")
    sys.stderr.flush()
