"""One model on many ranks: DDP, FSDP2, batch-norm groups, precision, compilation, memory."""
