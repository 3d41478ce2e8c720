"""Where processes run and who starts them: a lone machine, torchrun."""
