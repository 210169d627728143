"""What needs a GPU and Transformer Engine. Skipped elsewhere; the commands run in processes of their own, because the
other tests hide GPUs from theirs."""
