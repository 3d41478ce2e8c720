"""DeepSpeed's configuration: typed sections, where it is read from, and how it is put together."""
