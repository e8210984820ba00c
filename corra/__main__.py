"""`python -m corra` is `corra`."""

from .main import main

main()
