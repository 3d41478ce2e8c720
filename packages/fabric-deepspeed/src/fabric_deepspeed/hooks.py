"""What the registry may ask of this package. Neither torch nor DeepSpeed is imported here."""
