"""The parts of ``Fabric``, one file for each thing that a loop does: the class that joins them is in ``fabric.py``."""
