"""`python -m attnprune`, so that `torchrun -m attnprune sparsify …` works."""

from attnprune.cli.app import main

if __name__ == "__main__":
    main()
