"""What a checkpoint or a Hugging Face folder holds: `megatron-flowrl convert inspect` as a script. See --help."""

import sys

from megatron_flowrl.cli import main

if __name__ == "__main__":
    main(["convert", "inspect", *sys.argv[1:]])
