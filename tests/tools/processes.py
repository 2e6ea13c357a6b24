"""What tests run in processes of their own: importable there by name, and quickly."""

import os


def second_raises():
    print("said by a process")
    if os.environ["RANK"] == "1":
        raise ValueError(f"planted in {os.environ['LOCAL_RANK']} of {os.environ['WORLD_SIZE']}")
