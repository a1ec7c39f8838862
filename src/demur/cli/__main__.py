"""`python -m demur.cli`."""

from demur.cli import main

main()
