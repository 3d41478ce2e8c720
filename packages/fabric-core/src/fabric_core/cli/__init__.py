"""The command line. Each command is loaded when it runs; help and completion import none of them."""
