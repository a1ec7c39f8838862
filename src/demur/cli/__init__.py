"""The command line: parses, calls and prints. No other part of demur prints."""

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line. Bad input is one line on stderr and exit code 2; an interruption is
    exit code 130.
    """
    # Everything else is imported inside: an interruption of an import must end in one line too.
    try:
        from demur.cli.running import run

        code = run()
    except KeyboardInterrupt:
        code = INTERRUPTED
        sys.stderr.write("demur: interrupted. The same command goes on where it was.\n")
    sys.exit(code)
