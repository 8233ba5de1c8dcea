"""`python -m builder.cli` is `logit-dataset`."""

from builder.cli.entry import main

if __name__ == "__main__":
    main()
