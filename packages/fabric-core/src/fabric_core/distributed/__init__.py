"""Talking between processes through ``torch.distributed``: the group, and collectives on tensors and objects."""
