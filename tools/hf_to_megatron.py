"""A Hugging Face folder as a checkpoint: `megatron-flowrl convert hf-to-megatron` as a script. See --help."""

import sys

from megatron_flowrl.cli import main

if __name__ == "__main__":
    main(["convert", "hf-to-megatron", *sys.argv[1:]])
