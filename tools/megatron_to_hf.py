"""The weights of a checkpoint as a Hugging Face folder: `megatron-flowrl convert megatron-to-hf`. See --help."""

import sys

from megatron_flowrl.cli import main

if __name__ == "__main__":
    main(["convert", "megatron-to-hf", *sys.argv[1:]])
