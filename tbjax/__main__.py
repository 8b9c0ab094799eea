"""`python -m tbjax`, as launchers that start modules have it: `torchrun ... -m tbjax train ...`."""

from tbjax.cli import main

if __name__ == "__main__":
    main()
