"""`python -m fastft`, which `accelerate launch -m fastft run ...` needs."""

from fastft.cli import main

if __name__ == "__main__":
    main()
