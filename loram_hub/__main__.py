"""`python -m loram_hub` is the `loram` command."""

from loram_hub.cli import main

if __name__ == "__main__":
    main()
