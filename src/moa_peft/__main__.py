"""``python -m moa_peft`` is the command `moa`, for launchers that start modules, as ``torchrun -m moa_peft train``."""

from moa_peft.cli import main

if __name__ == "__main__":
    main()
