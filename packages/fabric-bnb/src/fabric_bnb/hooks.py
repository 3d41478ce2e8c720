"""What the registry may ask of this package. Neither torch nor bitsandbytes is imported here."""
