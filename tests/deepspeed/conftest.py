import os
import sys

# The folder has the name of a package that is installed: what the tests share is found here, without the folder's name.
sys.path.insert(0, os.path.dirname(__file__))
