"""What the strategies built on ``torch.distributed.fsdp.fully_shard`` share."""
