"""The command `corra`, also as `python -m corra`."""

from .cli.process import die_of_interrupts, own_process


def main() -> None:
    """Run the command line, in a process that is corra's own from its first import on."""
    die_of_interrupts()
    own_process()
    from .main import main as run

    run()


if __name__ == "__main__":
    main()
