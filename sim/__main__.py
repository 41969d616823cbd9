"""`python -m sim` is the same command as `overcommit`."""

from sim.cli import main

if __name__ == "__main__":
    main(prog_name="overcommit")
