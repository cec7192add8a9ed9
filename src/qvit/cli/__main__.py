"""``python -m qvit.cli``, for torchrun."""

from qvit.cli.app import main

if __name__ == "__main__":
    main()
