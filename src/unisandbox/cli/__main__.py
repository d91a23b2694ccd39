"""`python -m unisandbox.cli` is `unisandbox`."""

from unisandbox.cli import main

main()
