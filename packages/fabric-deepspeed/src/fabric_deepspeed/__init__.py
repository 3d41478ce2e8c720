"""DeepSpeed for Fabric."""
