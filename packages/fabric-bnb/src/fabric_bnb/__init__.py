"""Quantised layers of bitsandbytes for Fabric."""
