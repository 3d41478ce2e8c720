"""Checkpoints in DeepSpeed's layout: written completely or not at all, and read without DeepSpeed.

``layout`` says what the folder looks like. A save is ``saving``. A load is ``loading``, of whatever checkpoint there
is, into what ``live`` knows of an engine's memory, by way of ``weights`` and ``optimizer_state``. ``files`` reads the
files safely, ``partitions`` and ``optimizer_files`` find tensors in what the ranks have written, ``saved`` is all of it
together, and ``reader`` hands it to core, so that every strategy and the command line can use it. ``mixin`` is what the
strategy inherits.
"""
