"""Checkpoints looked at and written anew, tensor by tensor, without the objects they belong to: for the command line.

``describe`` and ``verify`` tell what is in one; ``consolidate`` and ``convert`` make another form of it, through
``streams`` and ``single_file``. Nothing of this is needed to train.
"""
