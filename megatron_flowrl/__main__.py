"""`python -m megatron_flowrl` and `torchrun -m megatron_flowrl` are the `megatron-flowrl` command."""

from megatron_flowrl.cli import main

if __name__ == "__main__":
    main()
